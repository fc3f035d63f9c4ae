"""Where a merged model goes from its directory: the Hugging Face hub, and GGUF files."""

"""The demo on SmolLM2-135M."""

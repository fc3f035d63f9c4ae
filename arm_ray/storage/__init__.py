"""Files behind URLs: object stores and the Hugging Face hub. Knows no Ray and no tensors."""

"""The decoder, its heads, its cache, and Hugging Face folders in and out."""

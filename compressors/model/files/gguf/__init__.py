"""GGUF files and ggml's types of weights at the level of bytes."""

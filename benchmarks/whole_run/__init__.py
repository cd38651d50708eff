"""The whole command against llama.cpp's own tools, for the same figures."""

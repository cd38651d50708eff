"""GGUF: what llama.cpp loads. Layout, metadata, vocabulary, the file itself, and the memory it will need."""

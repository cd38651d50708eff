"""The tokenizer of a checkpoint as GGUF metadata, for each kind of tokenizer that llama.cpp has."""

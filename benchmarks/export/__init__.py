"""Our GGUF export against llama.cpp's converter and quantizer."""

"""File formats at the level of bytes: JSON, safetensors, GGUF and ggml's blocks, ONNX and its blocks.

Readers here trust nothing that somebody else wrote.
"""

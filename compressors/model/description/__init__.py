"""The description of a model: its layers, tensors and rules as frozen values, made of ``config.json`` by its family.

The rules that compute something are defined here, too: routing, activations, rotary embeddings, llama.cpp's transforms.
Nothing here reads a file.
"""

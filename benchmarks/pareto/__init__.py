"""Divergence against bytes: the presets of llama.cpp, pruned experts, and the files of this tool."""

"""``moe-export pareto``: a model's divergence against the bytes of its file, beside llama.cpp's presets."""

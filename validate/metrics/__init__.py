"""Measured values: perplexity, divergence and its statistics, generation, floors, and the verdict on them."""

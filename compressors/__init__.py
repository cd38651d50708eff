"""Reading MoE models, and everything that changes their weights."""

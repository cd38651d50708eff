"""MoE checkpoints: what they are made of, how they are read, how they are run layer by layer."""

"""MoE checkpoints: describes them, reads them, and runs them layer by layer."""

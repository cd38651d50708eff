"""A model many times larger than memory: checkpoints of real shape; time, memory and bytes of every stage."""

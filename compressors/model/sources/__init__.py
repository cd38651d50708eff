"""The sources of weights: a checkpoint, a written file, or a student made of a checkpoint and its changes.

A source gives tensors by role; only the source knows how they lie on disk.
"""

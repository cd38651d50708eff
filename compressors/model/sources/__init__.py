"""Where weights come from: a checkpoint, a file that was written, or a student made of a checkpoint and its changes.

A source gives tensors by role; how they lie on disk is its own affair.
"""

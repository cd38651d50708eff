"""The description of a model: its layers, tensors and rules as frozen values, read once from ``config.json``.

Nothing here reads a weight. All other code asks these values and never the file.
"""

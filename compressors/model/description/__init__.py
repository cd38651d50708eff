"""What a model is: its layers, tensors and rules as frozen values, read once from ``config.json``.

Nothing here reads a weight. Everybody else asks these values and never the file.
"""

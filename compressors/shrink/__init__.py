"""Methods that make a model smaller: fewer experts, merged, decomposed or narrower ones, fewer layers.

Each is a function of a layer's weights and statistics.
"""

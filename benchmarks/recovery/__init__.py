"""``make bench``: the gain and the cost of every way of training a compressed model."""

"""``make quality``: every way of shrinking experts on the trained models, side by side."""

"""The supported MoE families, one file each: a file with a ``FAMILY`` is all that a new one needs."""

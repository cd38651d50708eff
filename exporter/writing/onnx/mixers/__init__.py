"""The nodes of each kind of mixer, one kind in a file."""

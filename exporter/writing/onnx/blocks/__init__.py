"""The nodes of each kind of feed-forward, one kind in a file."""

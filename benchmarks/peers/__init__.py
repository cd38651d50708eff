"""Other tools' readings of our files, each tool in an environment of its own."""

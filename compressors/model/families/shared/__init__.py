"""What the files of several families share: parts of layers, and how their settings are read and written."""

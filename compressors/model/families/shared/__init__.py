"""Parts of descriptions that several families share: tensors, layers, and how settings are read and written."""

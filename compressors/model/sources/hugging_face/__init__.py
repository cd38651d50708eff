"""A checkpoint in a folder, as transformers saves it, and everything that may be wrong with one."""

"""Compares vocabularies and tokenizers: whether a file cuts, begins and ends texts as the original does."""

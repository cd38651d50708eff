"""``config.json``: its settings as transformers reads them, and the description that a family makes of them."""

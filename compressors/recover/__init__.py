"""Teaching a compressed model to be itself again."""

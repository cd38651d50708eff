"""Routing: whether two models send the same tokens to the same experts, and whether a router itself is at fault."""

"""Compares routing: do two models send the same tokens to the same experts, and is a router itself at fault."""

"""Trains a compressed model to predict like the original again."""

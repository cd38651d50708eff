"""Stages that make the student: they compress the model, and recover its quality."""

"""The processes of a run: how they start, show their progress, work together, and end."""

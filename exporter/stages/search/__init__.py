"""Stages that compare many files: the search for the best one, and the curve of divergence against bytes."""

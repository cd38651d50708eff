"""Finds the best file that fits: types for tensors, structures for students, and the measurements that decide."""

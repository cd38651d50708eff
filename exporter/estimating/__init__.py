"""Estimates the needs of files and runs: sizes to the byte, memory by line, disk, and hours."""

"""Finds and describes files that anybody wrote, and compares their content with the expected one before they run."""

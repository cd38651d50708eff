"""Stages that write the student into files, and tune the values beside their codes."""

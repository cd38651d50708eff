"""Stages that measure: the student in torch, the files in their runtimes, and the original in both."""

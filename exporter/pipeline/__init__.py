"""Runs the stages that a plan needs, in order, each in a process of its own, and none that is done already."""

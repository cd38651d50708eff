"""Machines that people have, and the command ``fits``: what a model would give on each, told from its headers.

Nothing here measures: sizes are exact, divergences are those that the planner expects, and speeds follow from
bandwidths.
"""

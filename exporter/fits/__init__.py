"""The command ``fits``: what a model would give on each machine, told from its headers before anything is run.

Nothing here measures: sizes are exact, divergences are those that the planner expects, and speeds follow from
bandwidths.
"""

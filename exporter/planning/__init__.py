"""From the command line to a plan: the job, the recipe, and everything that is decided before a weight is read."""

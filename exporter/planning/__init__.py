"""This sub-package makes a plan of the command line: the job, the recipe, and all else that needs no weights."""

"""The work folder: finished and unfinished stages, what a stage is given to run, and what lets a killed run go on."""

"""The work folder: the names of the files in it, the stages' declarations, and what lets a killed run go on."""

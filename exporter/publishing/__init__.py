"""The output folder: a run's measurements as plain data for the report, and files that are complete or absent."""

"""The output folder: what a run measured as plain data for the report, and files that appear complete or not at all."""

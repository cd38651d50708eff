"""The work folder: finished and unfinished stages, the inputs of a stage, and the state that a killed run resumes."""

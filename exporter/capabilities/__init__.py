"""The capability table: what a GGUF file, an ONNX file and a saved student can hold, and why not the rest.

The planner, both writers, ``inspect`` and ``docs/families.md`` read the same rules.
"""

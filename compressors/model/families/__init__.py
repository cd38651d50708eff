"""The supported MoE families: architecture knowledge as data."""

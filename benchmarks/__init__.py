"""Timings as ratios against a peer measured in the same run, and comparisons that need other tools' environments."""

from compressors.model import quiet_libraries as quiet_libraries

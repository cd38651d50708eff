"""Timings as ratios against a peer measured in the same run, and comparisons that need other tools' environments."""

from compressors.model import no_telemetry as no_telemetry

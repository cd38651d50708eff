"""Makes files that run on a laptop from a MoE checkpoint: job, plan, stages, writers, command line."""

from compressors.model import quiet_libraries as quiet_libraries
from exporter.api import Flags, export, fits, inspect, load_student, validate

__all__ = ["Flags", "export", "fits", "inspect", "load_student", "validate"]

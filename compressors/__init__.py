"""Reading MoE models, and everything that changes their weights."""

from compressors.model import no_telemetry as no_telemetry

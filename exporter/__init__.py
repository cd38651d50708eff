"""From a MoE checkpoint to files that run on a laptop: job, plan, stages, writers, command line."""

from compressors.model import no_telemetry as no_telemetry

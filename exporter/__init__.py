"""From a MoE checkpoint to files that run on a laptop: job, plan, stages, writers, command line."""

from compressors.model import quiet_libraries as quiet_libraries

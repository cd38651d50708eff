"""Reading MoE models, and everything that changes their weights."""

from compressors.model import quiet_libraries as quiet_libraries

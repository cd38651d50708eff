"""Makes experts narrower, with their number unchanged."""

from compressors.shrink.slim.width import GGUF_WIDTH_MULTIPLE, SlimWidth, check_width

__all__ = ["GGUF_WIDTH_MULTIPLE", "SlimWidth", "check_width"]

"""Makes experts narrower, with their number unchanged. What plans ask needs no torch; the method is in ``width``."""

from compressors.shrink.slim.possible_widths import GGUF_WIDTH_MULTIPLE, check_width

__all__ = ["GGUF_WIDTH_MULTIPLE", "check_width"]

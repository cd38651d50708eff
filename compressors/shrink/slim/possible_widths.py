"""The widths that experts can have."""

from __future__ import annotations

from compressors.model.errors import InputError

__all__ = ["GGUF_WIDTH_MULTIPLE", "check_width"]

GGUF_WIDTH_MULTIPLE = 32
"""Values in a block of ggml's simplest quantized types: the down projection's rows, as long as an expert is wide, must
divide into such blocks."""


def check_width(width: int, full_width: int, *, for_gguf: bool = False) -> None:
    """Refuses an expert width that the model or, if asked for, GGUF cannot have.

    Raises:
        InputError: ``width`` is not from 1 to ``full_width``, or ``for_gguf`` and it is not a multiple of
            :data:`GGUF_WIDTH_MULTIPLE`.
    """
    if not 1 <= width <= full_width:
        raise InputError(
            f"cannot keep {width} of {full_width} intermediate neurons: give a width from 1 to {full_width}"
        )
    if for_gguf and width % GGUF_WIDTH_MULTIPLE:
        raise InputError(
            f"GGUF cannot quantize experts that are {width} wide: "
            f"give a multiple of {GGUF_WIDTH_MULTIPLE} up to {full_width}"
        )

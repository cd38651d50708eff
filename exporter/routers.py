"""Writing other routers into finished files that are not published yet: their bytes, in place, and no others.

Routers are float32 in both containers, so files whose experts stay as they are need not be written again. Writing the
same routers twice changes nothing, so an attempt that was killed half-way is simply repeated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from compressors.model.errors import InputError
from compressors.model.weights import Place, WrittenWeights
from exporter.files import not_written, replacing, write_at

__all__ = ["rewrite_routers"]


def rewrite_routers(weights: WrittenWeights, routers: Mapping[int, torch.Tensor]) -> None:
    """Puts these routers into the file that ``weights`` reads, and flushes it to disk.

    Args:
        weights: the opened file; it counts as changed afterwards and has to be opened again.
        routers: float32 [E, D], by layer.

    Raises:
        InputError: the file has another router there, or one that is not float32, and nothing was written; or it
            cannot be written.
    """
    writes = [(weights.router_place(layer), router) for layer, router in routers.items()]
    for place, router in writes:
        if router.dtype != torch.float32 or tuple(router.shape) != place.shape:
            dtype = str(router.dtype).removeprefix("torch.")
            raise InputError(
                f"{place.file}: tensor {place.name} is a float32 router of shape {list(place.shape)}; one of shape "
                f"{list(router.shape)} in {dtype} cannot take its place"
            )
    if writes:
        _write(writes[0][0].file, writes)


def _write(file: Path, writes: Sequence[tuple[Place, torch.Tensor]]) -> None:
    try:
        if file.stat().st_nlink > 1:  # an output folder has it too, and must keep what it has
            _copy_in_place(file)
        with file.open("r+b", buffering=0) as stream:
            for place, router in writes:
                write_at(stream.fileno(), place.offset, router.detach().cpu().contiguous().numpy().reshape(-1).data)
            os.fsync(stream.fileno())
    except OSError as error:
        raise not_written(file, error) from error


def _copy_in_place(file: Path) -> None:
    """Puts a copy in the place of a file that has other names."""
    with file.open("rb") as original, replacing(file) as copy:
        shutil.copyfileobj(original, copy)

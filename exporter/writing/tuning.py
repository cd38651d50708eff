"""Puts other tunable values into a finished file that is not published yet: their bytes, in place.

Routers, norms and the scales of blocks keep their place and size, so a file whose codes stay need not be written again.
Writing the same values twice changes nothing, and the file's first values are kept beside it before anything is changed
(:func:`keep_values`): so an attempt that was killed half-way is simply repeated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.sources.weights import TunablePart, WrittenWeights
from exporter.writing.files import complete_or_absent, not_written, replacing, write_at

__all__ = ["keep_values", "rewrite"]


def keep_values(weights: WrittenWeights, spec: ModelSpec, path: Path) -> None:
    """Keeps all tunable values of a file that was just written.

    Args:
        weights: the opened file.
        spec: the model in it.
        path: a safetensors file.

    Raises:
        InputError: a router or norm is not float32, or there is no room.
    """
    values = {
        tensor.gguf.name.format(layer=layer): weights.tunable(tensor.role, layer)
        for tensor, layer in _tunable(weights, spec)
    }
    with complete_or_absent(path) as place:
        save_file(values, place)


def rewrite(weights: WrittenWeights, values: Mapping[str, torch.Tensor]) -> None:
    """Puts these tunable values into the file that ``weights`` reads, and flushes it to disk.

    Args:
        weights: the opened file; it counts as changed afterwards and has to be opened again.
        values: the values by name, as :class:`~compressors.model.sources.weights.WrittenWeights` has them.

    Raises:
        InputError: the file has no such values (nothing was written then), or it cannot be written.
    """
    parts = weights.with_values(values).changed_parts()
    for file, of_file in groupby(parts, key=attrgetter("file")):
        try:
            if file.stat().st_nlink > 1:  # an output folder has it too, and must keep its content
                _copy_in_place(file)
            with file.open("r+b", buffering=0) as stream:
                for part in of_file:
                    _put(stream.fileno(), part)
                os.fsync(stream.fileno())
        except OSError as error:
            raise not_written(file, error) from error


def _put(descriptor: int, part: TunablePart) -> None:
    stored = np.frombuffer(os.pread(descriptor, part.n_bytes, part.offset), dtype=np.uint8).copy()
    part.put(stored)
    write_at(descriptor, part.offset, stored.data)


def _tunable(weights: WrittenWeights, spec: ModelSpec) -> Iterator[tuple[TensorSpec, int | None]]:
    """Every tensor of a file that can be tuned: routers, norms, and matrices of layers that have scales."""
    for tensor, layer in spec.written.places:
        has_scales = tensor.kind is Kind.MATRIX and weights.block_length(tensor.role, layer) is not None
        if has_scales or tensor.kind in (Kind.ROUTER, Kind.NORM):
            yield tensor, layer


def _copy_in_place(file: Path) -> None:
    """Replaces a file that has other names by a copy, because those names must keep their content."""
    with file.open("rb") as original, replacing(file) as copy:
        shutil.copyfileobj(original, copy)

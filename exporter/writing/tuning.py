"""Putting other tunable values into a finished file that is not published yet: their bytes, in place.

Routers, norms and the scales of blocks keep their place and size, so a file whose codes stay need not be written again.
Writing the same values twice changes nothing, and what the file was written with is kept beside it before anything is
changed (:func:`keep_values`): so an attempt that was killed half-way is simply repeated.
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

from compressors.model.description.legacy import ATTENTION, NORMS
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.weights import TunablePart, WrittenWeights
from exporter.writing.files import complete_or_absent, not_written, replacing, write_at

__all__ = ["keep_values", "rewrite"]


def keep_values(weights: WrittenWeights, spec: ModelSpec, path: Path) -> None:
    """Keeps all tunable values of a file that was just written.

    Args:
        weights: the opened file.
        spec: of its model.
        path: of a safetensors file.

    Raises:
        InputError: a router or norm is not float32, or there is no room.
    """
    values = {spec.gguf_name(role, layer): weights.tunable(role, layer) for role, layer in _tunable(weights, spec)}
    with complete_or_absent(path) as place:
        save_file(values, place)


def rewrite(weights: WrittenWeights, values: Mapping[str, torch.Tensor]) -> None:
    """Puts these tunable values into the file that ``weights`` reads, and flushes it to disk.

    Args:
        weights: the opened file; it counts as changed afterwards and has to be opened again.
        values: by name, as :class:`~compressors.model.sources.weights.WrittenWeights` has them.

    Raises:
        InputError: the file has no such values, and nothing was written; or it cannot be written.
    """
    parts = weights.with_values(values).changed_parts()
    for file, of_file in groupby(parts, key=attrgetter("file")):
        try:
            if file.stat().st_nlink > 1:  # an output folder has it too, and must keep what it has
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


def _tunable(weights: WrittenWeights, spec: ModelSpec) -> Iterator[tuple[Role, int | None]]:
    """Every tensor of a file that can be tuned: routers, norms, and matrices of layers that have scales."""
    for role in spec.stored_roles:
        for layer in [None] if role.is_global else range(spec.n_layers):
            if layer is not None and not _is_in(role, spec.layer(layer)):
                continue
            is_matrix = role in ATTENTION or role.is_expert
            if role is Role.ROUTER or role in NORMS or (is_matrix and weights.block_length(role, layer) is not None):
                yield role, layer


def _is_in(role: Role, layer: ModelSpec) -> bool:
    return layer.has_moe if role.is_expert else role in layer.layer_roles(0)


def _copy_in_place(file: Path) -> None:
    """Puts a copy in the place of a file that has other names, which must keep what they have."""
    with file.open("rb") as original, replacing(file) as copy:
        shutil.copyfileobj(original, copy)

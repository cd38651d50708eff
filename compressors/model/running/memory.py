"""Decides what lies in memory while a model streams through it.

The limit decides where data lies, never what is computed: numbers of tokens that are computed together are constants,
so results are the same bits under every limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.files.storage_type import StorageType

if TYPE_CHECKING:
    import torch

__all__ = [
    "PROCESS_BYTES",
    "MemoryLimit",
    "Placement",
    "blocks_at_once",
    "give_back_freed",
    "least_bytes",
    "place",
    "position_chunks",
    "positions_at_once",
    "rows_at_once",
    "working_bytes",
]

PROCESS_BYTES = 750_000_000
"""Measured: Python, torch and transformers, and the memory that the allocator keeps."""

_BLOCKS_AT_ONCE = {4: 8, 2: 16}  # by bytes of a value
_LOGIT_BYTES = 128_000_000
_ACTIVATIONS = 16  # measured: arrays of the hidden state's size that a layer's forward and backward hold at a time
_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that this process may use in all, and a folder for everything that does not fit."""

    n_bytes: int
    spill: Path  # a folder


@dataclass(frozen=True)
class Placement:
    """The places of layers and hidden states during a pass."""

    n_resident: int  # layers that stay in memory
    read_ahead: bool  # the next layer is read while one computes
    spill: Path | None  # hidden states lie in a file of this folder


def blocks_at_once(dtype: torch.dtype | StorageType) -> int:
    """Token blocks in one call of a layer: enough tokens for every expert's products to be efficient.

    Args:
        dtype: the arithmetic, float32 or bfloat16.
    """
    return _BLOCKS_AT_ONCE[dtype.itemsize]


def positions_at_once(vocab_size: int) -> int:
    """Positions whose logits are made together: a power of two from 256 to 2048."""
    n_positions = 2048
    while n_positions > 256 and n_positions * vocab_size * 4 > _LOGIT_BYTES:
        n_positions //= 2
    return n_positions


def position_chunks(states_ND: torch.Tensor, vocab_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first position, states) of chunks whose logits fit in memory."""
    n_positions = positions_at_once(vocab_size)
    for start in range(0, len(states_ND), n_positions):
        yield start, states_ND[start : start + n_positions]


def working_bytes(spec: ModelSpec) -> int:
    """Memory for computing one layer beside weights and hidden states: activations, and one expert in float32."""
    return _activation_bytes(spec) + 4 * max(layer.expert_parameters for layer in spec.blocks)


def rows_at_once(spec: ModelSpec, n_keys: int) -> int:
    """Single positions of cached texts in one call of a layer: at most 512, a multiple of 16.

    Each row has keys and values of its own, repeated for every query head, so few fit among a layer's activations.

    Args:
        spec: the model.
        n_keys: positions of a text that the cache has room for.
    """
    mixers = [layer.mixer for layer in spec.layers if layer.mixer.cached_values]
    values = max((mixer.cached_values + 5 * mixer.width // 2 for mixer in mixers), default=0)  # latent keys are wider
    n_rows = _activation_bytes(spec) // max(4 * n_keys * values, 1)
    return max(_ROWS_STEP, min(_MOST_ROWS, n_rows // _ROWS_STEP * _ROWS_STEP))


_ROWS_STEP, _MOST_ROWS = 16, 512


def _activation_bytes(spec: ModelSpec) -> int:
    """Memory for the activations of the token blocks of one call."""
    width = max(spec.hidden_size, *(_state_width(layer) for layer in spec.blocks))
    return blocks_at_once(StorageType.F32) * _BLOCK_TOKENS * width * 4 * _ACTIVATIONS


def _state_width(layer: LayerSpec) -> int:
    """The most inputs or outputs of any matrix of the layer outside of experts."""
    matrices = (tensor for tensor in layer.shared_tensors if tensor.is_quantizable)
    return max((max(layer.dimensions(tensor)) for tensor in matrices), default=0)


def place(
    limit: MemoryLimit | None, spec: ModelSpec, layer_bytes: int, hidden_bytes: int, *, held_bytes: int | None = None
) -> Placement:
    """Decides what lies in memory; if there is room, everything does.

    Reading ahead comes first, since it costs one layer and hides all reading; then the hidden states; then layers.

    Args:
        limit: the limit; None keeps hidden states in memory and no layer.
        spec: the model.
        layer_bytes: bytes of one decoder layer in storage dtype.
        hidden_bytes: bytes of all hidden states that the pass keeps.
        held_bytes: bytes that the process holds already; measured if None.
    """
    if limit is None:
        return Placement(0, True, None)
    # a process that has just begun has not loaded all libraries yet
    held = max(psutil.Process().memory_info().rss, PROCESS_BYTES) if held_bytes is None else held_bytes
    one, two = (least_bytes(spec, n_layers * layer_bytes) for n_layers in (1, 2))
    read_ahead = limit.n_bytes - held >= two
    free = limit.n_bytes - held - (two if read_ahead else one)
    fits = free >= hidden_bytes
    free -= hidden_bytes if fits else 0
    n_resident = max(0, min(spec.n_layers, free // layer_bytes))
    return Placement(n_resident, read_ahead, None if fits else limit.spill)


def least_bytes(spec: ModelSpec, layer_bytes: int) -> int:
    """Memory that a pass needs beside the process itself: layers of this size with activations, or the head."""
    return max(layer_bytes + working_bytes(spec), _head_bytes(spec))


def give_back_freed() -> None:
    """Returns freed memory to the system.

    glibc keeps what lies between live arrays; while layers stream it grows by up to 150 MB a layer (measured).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other allocators have no such thing
    if trim is not None:
        trim(0)


def _head_bytes(spec: ModelSpec) -> int:
    """Bytes of the head in float32, and of the logits of one chunk with their intermediate results."""
    return 4 * spec.vocab_size * (spec.hidden_size + 2 * positions_at_once(spec.vocab_size))

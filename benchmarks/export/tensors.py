"""Compares the tensors of two GGUF files; their metadata may differ."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader

__all__ = ["equal_tensors"]


def equal_tensors(our_file: Path, their_file: Path) -> tuple[int, int]:
    """How many tensors have the same name, type, shape and bytes in both files, of how many."""
    our_tensors, their_tensors = (
        {tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (our_file, their_file)
    )
    equal = 0
    for name in our_tensors.keys() & their_tensors.keys():
        one, other = our_tensors[name], their_tensors[name]
        same_kind = one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)
        equal += same_kind and bool((one.data == other.data).all())
    return equal, len(our_tensors.keys() | their_tensors.keys())

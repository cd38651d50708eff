"""Compares the tensors of two GGUF files; their metadata may differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor

__all__ = ["differing_tensors", "equal_tensors"]


def equal_tensors(our_file: Path, their_file: Path) -> tuple[int, int]:
    """How many tensors have the same name, type, shape and bytes in both files, of how many."""
    names, total = differing_tensors(our_file, their_file)
    return total - len(names), total


def differing_tensors(our_file: Path, their_file: Path) -> tuple[list[str], int]:
    """The names of the tensors that are not the same in both files, and the number of all.

    Gates and ups of experts that their file has in one tensor, and ours in two, are the same if their values are.
    """
    our_tensors, their_tensors = (
        {tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (our_file, their_file)
    )
    in_both = our_tensors.keys() & their_tensors.keys()
    equal = {name for name in in_both if _are_equal(our_tensors[name], their_tensors[name])}
    joined = [name for name in their_tensors if _JOINED in name and _is_joined(their_tensors[name], our_tensors)]
    equal |= {name.replace(_JOINED, part) for name in joined for part in (_JOINED, *_PARTS)}
    names = our_tensors.keys() | their_tensors.keys()
    return sorted(names - equal), len(names)


_JOINED, _PARTS = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")


def _is_joined(theirs: ReaderTensor, ours: Mapping[str, ReaderTensor]) -> bool:
    """Whether our two tensors have the values of their one; gates come first for each expert."""
    parts = [ours.get(theirs.name.replace(_JOINED, part)) for part in _PARTS]
    found = [part.data for part in parts if part is not None and part.tensor_type == theirs.tensor_type]
    return len(found) == len(parts) and np.array_equal(np.concatenate(found, axis=1), theirs.data)


def _are_equal(one: ReaderTensor, other: ReaderTensor) -> bool:
    same_kind = one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)
    return same_kind and one.data.tobytes() == other.data.tobytes()

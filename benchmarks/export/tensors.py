"""Compares the tensors of two GGUF files; their metadata may differ."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, ReaderTensor

__all__ = ["differing_tensors", "equal_tensors"]


def equal_tensors(our_file: Path, their_file: Path) -> tuple[int, int]:
    """How many tensors have the same name, type, shape and bytes in both files, of how many."""
    names, total = differing_tensors(our_file, their_file)
    return total - len(names), total


def differing_tensors(our_file: Path, their_file: Path) -> tuple[list[str], int]:
    """The names of the tensors that are not the same in both files, and the number of all."""
    our_tensors, their_tensors = (
        {tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (our_file, their_file)
    )
    in_both = our_tensors.keys() & their_tensors.keys()
    equal = {name for name in in_both if _are_equal(our_tensors[name], their_tensors[name])}
    names = our_tensors.keys() | their_tensors.keys()
    return sorted(names - equal), len(names)


def _are_equal(one: ReaderTensor, other: ReaderTensor) -> bool:
    same_kind = one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)
    return same_kind and one.data.tobytes() == other.data.tobytes()

"""Turns trained tensors into values that a written file can take: routers, norms, and scales of blocks as rounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressors.model.files.block_scales import rescaled
from compressors.recover.trained_student import TrainedStudent

__all__ = ["learned_values"]


def learned_values(trained: TrainedStudent, original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tunable values of a file that training has changed, by name.

    Args:
        trained: routers, norms and factors of blocks.
        original: values that the file was written with (:class:`~compressors.model.sources.weights.WrittenWeights`).
    """
    written = trained.student.spec.written
    names = {(tensor.role, layer): tensor.gguf.name.format(layer=layer) for tensor, layer in written.places}
    values: dict[str, torch.Tensor] = {}
    for role, layer, tensor in trained.whole():
        if (role, layer) in names:  # a dense model's file has no routers
            values[names[role, layer]] = tensor.clone()
    for role, layer, factors_RK in trained.factors():
        name = names[role, layer]
        values[name] = rescaled(original[name], factors_RK)
    return values

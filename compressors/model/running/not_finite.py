"""Finds the part of a layer that first made a value that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compressors.model.errors import InputError
from compressors.model.sources.student import Student

__all__ = ["NotFiniteError", "not_finite_error"]


class NotFiniteError(InputError):
    """The computation, not the weights, made a value that is not finite."""


def not_finite_error(
    student: Student,
    index: int,
    layer: nn.Module,
    rows_BTD: torch.Tensor,
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> NotFiniteError:
    """Makes the error that names the layer, and the expert, by running the layer once more.

    Args:
        student: the model.
        index: the layer's index.
        layer: transformers' decoder layer, with its weights.
        rows_BTD: the states that gave such values.
        run: runs the layer.
    """
    routed = student.spec.blocks[index].routed
    makers: list[str] = []

    def watch_router(_router: nn.Module, inputs: tuple[torch.Tensor, ...], _outputs: Any) -> None:
        if not torch.isfinite(inputs[0]).all():
            makers.append("its attention")

    def watch_expert(expert: int, _gates: torch.Tensor, _hidden: torch.Tensor, outputs_nD: torch.Tensor) -> None:
        if not torch.isfinite(outputs_nD).all():
            makers.append(f"expert {expert}")

    if routed is not None:
        handle = layer.get_submodule(routed.router_module).register_forward_hook(watch_router)
        layer.get_submodule(routed.experts_module).observer = watch_expert  # type: ignore[assignment]
        run(layer, rows_BTD)
        handle.remove()
    made_by = makers[0] if makers else "a sum of large values"
    dtype = str(rows_BTD.dtype).removeprefix("torch.")
    return NotFiniteError(
        f"{student.source.path}: layer {index} turns the text into NaN or infinite values, first in {made_by}; the "
        f"checkpoint is damaged there, or does not work in {dtype}"
    )

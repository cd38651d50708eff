"""Trained tensors and Adam's moments of them, as plain tensors by name, to continue an interrupted training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["optimizer_state", "restore_optimizer"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns values and moments, in memory that the next step changes; before the first step there are no moments."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach().cpu()
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{name}.{moment}"] = value.cpu()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Undoes :func:`optimizer_state`; ``tensors`` may hold others too."""
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        moments = {moment: f"{name}.{moment}" for moment in _MOMENTS}
        if moments["step"] in tensors:
            optimizer.state[parameter] = {
                # Adam counts its steps on the CPU
                moment: tensors[key].clone() if moment == "step" else tensors[key].to(parameter.device, copy=True)
                for moment, key in moments.items()
            }

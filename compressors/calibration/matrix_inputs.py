"""Watches the inputs of a decoder layer's matrices, except those of experts.

Matrices that are multiplied with the same values share one input, named by the role of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from compressors.calibration.sizes import matrices_with_own_input
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec

__all__ = ["watching_inputs"]


@contextmanager
def watching_inputs(module: nn.Module, layer: LayerSpec, see: Callable[[Role, torch.Tensor], None]) -> Iterator[None]:
    """Shows each different input of these matrices while the context lasts.

    Args:
        module: transformers' decoder layer.
        layer: its description.
        see: is called with the input's role and its rows, [tokens, inputs], before they are multiplied.
    """

    def look(role: Role, _matrix: nn.Module, inputs: tuple[Any, ...]) -> None:
        see(role, inputs[0].flatten(0, -2))

    handles = [
        module.get_submodule(tensor.submodule).register_forward_pre_hook(partial(look, tensor.role))
        for tensor in matrices_with_own_input(layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

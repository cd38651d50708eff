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

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec
from compressors.model.description.tensors import Kind, TensorSpec

__all__ = ["input_sizes", "matrices_beside_experts", "watching_inputs"]


def matrices_beside_experts(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    """The matrices of a layer that files may quantize, except those of its routed experts, and tables of tokens."""
    return tuple(tensor for tensor in layer.shared_tensors if tensor.kind is Kind.MATRIX)


def input_sizes(layer: LayerSpec) -> dict[Role, int]:
    """The number of values in each different input of these matrices."""
    return {tensor.role: layer.dimensions(tensor)[-1] for tensor in _with_own_input(layer)}


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
        for tensor in _with_own_input(layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_own_input(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in matrices_beside_experts(layer) if tensor.input_role is tensor.role)

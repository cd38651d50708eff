"""Gradients of a model that runs layer by layer.

The forward pass stores each layer's input; the backward pass runs the layers again in reverse and pulls the gradient
through each (a vector-Jacobian product). So only the stored inputs, which go to disk above the limit, and the trained
tensors take more memory in a model with more layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import position_chunks
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.running.streaming import LayerObserver, StreamedModel, TokenGroup

__all__ = ["Head", "Loss", "ParameterKey", "RouterLoss", "StateLoss", "streamed_gradients"]
__all__ += ["embedding_gradient"]

ParameterKey = tuple[str, int | None]
"""A trainable tensor's name, and its layer; None for the final norm."""

Loss = Callable[[slice, torch.Tensor], torch.Tensor]
"""(positions of the flattened blocks, their logits [n, V]) -> the summed loss of these positions."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Final norm and head: states after the last layer [n, D] -> logits [n, V]."""

StateLoss = Callable[[slice, torch.Tensor, Head], torch.Tensor]
"""(positions of the flattened blocks, their states after the last layer [n, D], the head) -> the summed loss of these
positions; serves losses that take another model's states through the same head."""

RouterLoss = Callable[[int, slice, torch.Tensor], torch.Tensor]
"""(layer, blocks, their tokens' router logits [b * T, E]) -> the summed loss of these tokens in this layer."""


def streamed_gradients(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    loss: Loss | None,
    dtype: torch.dtype = torch.float32,
    router_loss: RouterLoss | None = None,
    state_loss: StateLoss | None = None,
    observers: Sequence[LayerObserver] = (),
) -> tuple[float, dict[ParameterKey, torch.Tensor]]:
    """Loss of these blocks and its gradient with respect to every trainable tensor of the model.

    Args:
        model: the model, with the tensors that are trained.
        tokens_BT: int64 token ids.
        loss: the loss of the logits.
        dtype: the dtype of the arithmetic; gradients are float32.
        router_loss: the loss of the router logits of each layer with experts, which is added.
        state_loss: the loss of the states after the last layer, where there is no ``loss``; without either the head
            does not run.
        observers: watch the layers in the forward pass, which ends before any loss is computed.

    Returns:
        The sum of all losses, and gradients by (name, layer).

    Raises:
        NotFiniteError: a hidden state is NaN or infinite.
    """
    gradients: dict[ParameterKey, torch.Tensor] = {
        key: torch.zeros_like(tensor) for key, tensor in model.trained(None).items()
    }
    states = _layer_inputs(model, tokens_BT, dtype, observers)
    last = states.pop()
    if loss is not None:
        state_loss = _of_states(loss)
    if state_loss is None:
        total, gradient_BTD = 0.0, torch.zeros(last.shape, dtype=dtype)
    else:
        total, gradient_BTD = _head_gradient(model, last, state_loss, gradients)
    for index, weights in model.weights(range(model.spec.n_layers)[::-1]):
        with model.layer(index, weights, dtype) as layer:
            value, found = _pull_back(model, index, layer, states.pop(), gradient_BTD, router_loss)
        total += value
        gradients |= found
    return total, gradients


def embedding_gradient(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    loss: StateLoss,
    dtype: torch.dtype = torch.float32,
    observers: Sequence[LayerObserver] = (),
    gradient_observers: Sequence[LayerObserver] = (),
) -> torch.Tensor:
    """The gradient of a loss with respect to the hidden states that enter the first layer: [B, T, D] in ``dtype``.

    Args:
        model: the model, without trained tensors.
        tokens_BT: int64 token ids.
        loss: the loss of the states after the last layer.
        dtype: the dtype of the arithmetic.
        observers: watch the layers in the forward pass, first to last.
        gradient_observers: watch the layers in the backward pass, last to first: hooks that they set on a layer's
            tensors see those tensors' gradients.

    Raises:
        NotFiniteError: a hidden state is NaN or infinite.
    """
    states = _layer_inputs(model, tokens_BT, dtype, observers)
    _, gradient_BTD = _head_gradient(model, states.pop(), loss, {})
    for index, weights in model.weights(range(model.spec.n_layers)[::-1]):
        with model.layer(index, weights, dtype) as layer, ExitStack() as stack:
            for observe in gradient_observers:
                stack.enter_context(observe(index, layer))
            _pull_back(model, index, layer, states.pop(), gradient_BTD, None)
    return gradient_BTD


def _layer_inputs(
    model: StreamedModel, tokens_BT: torch.Tensor, dtype: torch.dtype, observers: Sequence[LayerObserver]
) -> list[HiddenStates]:
    """The hidden states that enter each layer, then those that leave the last."""
    n_layers = model.spec.n_layers
    states = model.first_states([TokenGroup(tokens_BT, dtype=dtype)], n_kept=n_layers + 1)
    for index, weights in model.weights(range(n_layers)):
        states.append(HiddenStates(states[0].shape, dtype, states[0].spill))
        model.run(index, weights, states[-2], states[-1], observers)
    return states


def _of_states(loss: Loss) -> StateLoss:
    return lambda positions, states_nD, head: loss(positions, head(states_nD).float().cpu())


def _head_gradient(
    model: StreamedModel, hidden: HiddenStates, loss: StateLoss, gradients: dict[ParameterKey, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient with respect to the last layer's output [B, T, D].

    Adds the gradients of the head's trained tensors to ``gradients``.
    """
    flat = hidden.read(slice(0, len(hidden))).flatten(0, 1)
    gradient = torch.empty_like(flat)
    total, trained = 0.0, model.trained(None)
    with model.head(hidden.dtype) as head:
        for start, part in position_chunks(flat, model.spec.vocab_size):
            positions = slice(start, start + len(part))
            part = part.detach().to(model.device).requires_grad_()
            value = loss(positions, part, head)
            gradient[positions], *found = torch.autograd.grad(value, [part, *trained.values()])
            for key, found_gradient in zip(trained, found, strict=True):
                gradients[key] += found_gradient
            total += value.item()
    return total, gradient.view(hidden.shape)


def _pull_back(
    model: StreamedModel,
    index: int,
    layer: nn.Module,
    inputs: HiddenStates,
    gradient_BTD: torch.Tensor,
    router_loss: RouterLoss | None,
) -> tuple[float, dict[ParameterKey, torch.Tensor]]:
    """Replaces the gradient of the layer's output in ``gradient_BTD`` by that of its input.

    Returns:
        The layer's own loss, and the gradients of its trainable tensors.
    """
    parameters = model.trained(index)
    gradients = {key: torch.zeros_like(tensor) for key, tensor in parameters.items()}
    total = 0.0
    for blocks in inputs.groups(model.blocks_at_once(inputs.dtype)):
        rows = inputs.read(blocks).detach().to(model.device).requires_grad_()
        output, router_logits = _run(model, index, layer, rows)
        outputs: list[torch.Tensor] = [output]
        output_gradients: list[torch.Tensor | None] = [gradient_BTD[blocks].to(model.device)]
        if router_loss is not None and router_logits is not None:
            outputs.append(router_loss(index, blocks, router_logits))
            output_gradients.append(None)  # autograd takes it for one
            total += outputs[-1].item()
        input_gradient, *found = torch.autograd.grad(outputs, [rows, *parameters.values()], output_gradients)
        gradient_BTD[blocks] = input_gradient.to("cpu")
        for key, value in zip(parameters, found, strict=True):
            gradients[key] += value
    return total, gradients


def _run(
    model: StreamedModel, index: int, layer: nn.Module, rows_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's output, and its router's logits if it has one."""
    routed = model.spec.layers[index].routed
    if routed is None:
        return model.run_layer(layer, rows_BTD), None
    calls: list[RoutedCall] = []
    with watching(layer, routed, calls.append):
        return model.run_layer(layer, rows_BTD), calls[0].logits_TE

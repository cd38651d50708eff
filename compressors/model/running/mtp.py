"""Runs the layer that predicts one more token, behind the decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from compressors.model.description.mtp import MTP_MODULES
from compressors.model.description.roles import Role
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.layers import LayerWeights
from compressors.model.running.not_finite import not_finite_error
from compressors.model.running.streaming import LayerObserver, StreamedModel, TokenGroup

__all__ = ["advance_with_mtp", "run_mtp"]


@torch.no_grad()
def advance_with_mtp(
    model: StreamedModel, groups: Sequence[TokenGroup], hidden: Sequence[HiddenStates], layers: range
) -> Iterator[int]:
    """Takes the hidden states through layers as :meth:`StreamedModel.advance` does, the layer for MTP among them.

    Only the first group goes through that layer, for its observers' sake: no states change there.
    """
    yield from model.advance(groups, hidden, range(layers.start, min(layers.stop, model.spec.n_layers)))
    for index, weights in model.weights(range(model.spec.n_layers, layers.stop)):
        run_mtp(model, weights, groups[0].tokens_BT, hidden[0], observers=groups[0].observers)
        yield index


@torch.no_grad()
def run_mtp(
    model: StreamedModel,
    weights: LayerWeights,
    tokens_BT: torch.Tensor,
    states: HiddenStates,
    target: HiddenStates | None = None,
    observers: Sequence[LayerObserver] = (),
) -> None:
    """Runs the layer at every position but a block's last one, of which the next token is not known.

    See ``graph_mtp`` in llama.cpp's ``src/models/qwen35moe.cpp``, which the other families' graphs are like.

    Args:
        model: the model.
        weights: the weights of the layer.
        tokens_BT: the tokens of the blocks.
        states: the hidden states after the last decoder layer, and the dtype of the arithmetic.
        target: takes the layer's outputs, before the norm in front of the head; None: they are not kept.
        observers: as in :class:`~compressors.model.running.streaming.TokenGroup`.

    Raises:
        NotFiniteError: a value is not finite.
    """
    index = model.spec.n_layers
    with model.layer(index, weights, states.dtype) as layer, ExitStack() as stack:
        for observe in observers:
            stack.enter_context(observe(index, layer))
        for blocks in states.groups(model.blocks_at_once(states.dtype)):
            inputs = _inputs(model, layer, tokens_BT[blocks], states.read(blocks))
            output = model.run_layer(layer, inputs)
            if not torch.isfinite(output).all():
                raise not_finite_error(model.student, index, layer, inputs, model.run_layer)
            if target is not None:
                target.write(blocks, output.to("cpu"))


def _inputs(model: StreamedModel, layer: nn.Module, tokens_BT: torch.Tensor, states_BTD: torch.Tensor) -> torch.Tensor:
    """The layer's inputs, [B, T - 1, D]: of each position's state, and of the token that follows."""
    projection, of_embedding, of_state = (layer.get_submodule(MTP_MODULES[role]) for role in _INPUT_ROLES)
    embedded = _embedded(model, tokens_BT[:, 1:]).to(model.device, states_BTD.dtype)
    normed = model.head_inputs(states_BTD[:, :-1].to(model.device))
    both = torch.cat([of_embedding(embedded), of_state(normed)], dim=-1)
    output: torch.Tensor = projection(both)
    return output


def _embedded(model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The rows of the layer's own embedding, or of the model's: [B, T, D]."""
    mtp, index = model.spec.mtp, model.spec.n_layers
    if mtp is None or Role.MTP_EMBEDDING not in mtp.roles:
        return model.embed(tokens_BT)
    used, positions = tokens_BT.unique(return_inverse=True)
    rows = [model.student.rows(Role.MTP_EMBEDDING, index, slice(token, token + 1)) for token in used.tolist()]
    return torch.cat(rows)[positions]


_INPUT_ROLES = (Role.MTP_PROJECTION, Role.MTP_EMBEDDING_NORM, Role.MTP_STATE_NORM)

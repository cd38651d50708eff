"""One pass over the calibration tokens that gathers what every criterion needs.

Routed experts only: an expert is run on the tokens that chose it, and never on others. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.shape import MoeShape
from compressors.model.student import ExpertMap

__all__ = ["Importance", "LayerStatistics", "StatisticsCollector", "importance", "load_statistics", "save_statistics"]

Importance = dict[tuple[Role, int | None], torch.Tensor]
"""Mean squared input of each column: float32 [inputs] for a linear layer, [E, inputs] for experts in the student's
numbering. A matrix that is absent is quantized without."""


@dataclass
class LayerStatistics:
    """Sums over one layer's calibration tokens; T_e are the tokens that chose expert e, g its gate, f its output."""

    n_tokens: torch.Tensor  # scalar: tokens seen
    count_E: torch.Tensor  # |T_e|
    gate_sum_E: torch.Tensor  # sum of g over T_e
    norm_sum_E: torch.Tensor  # sum of ||f||
    gate_norm_sum_E: torch.Tensor  # sum of g ||f||
    norm_square_sum_E: torch.Tensor  # sum of ||f||^2
    norm_max_E: torch.Tensor  # largest ||f||
    output_max_E: torch.Tensor  # largest |f| of any element: super-experts stand out here
    output_sum_ED: torch.Tensor  # sum of f
    gate_up_input_square_ED: torch.Tensor  # sum of squares of the expert's inputs
    down_input_square_EF: torch.Tensor  # sum of squares of the inputs of the down projection
    router_logit_gram_EE: torch.Tensor  # logits^T logits over all tokens
    router_probability_sum_E: torch.Tensor  # sum of the full softmax over all tokens
    attention_input_square_D: torch.Tensor  # inputs of query, key and value
    attention_output_input_square: torch.Tensor  # inputs of the attention output projection [H * head_dim]
    moe_cosine_sum: torch.Tensor  # cos(x, x + MoE(norm(x))): 1 means that the MoE sub-layer changes nothing
    block_cosine_sum: torch.Tensor  # cos(layer input, layer output)

    @classmethod
    def zeros(cls, shape: MoeShape) -> LayerStatistics:
        """Nothing seen yet."""
        sizes: dict[str, tuple[int, ...]] = {
            "output_sum_ED": (shape.n_experts, shape.hidden_size),
            "gate_up_input_square_ED": (shape.n_experts, shape.hidden_size),
            "down_input_square_EF": (shape.n_experts, shape.expert_width),
            "router_logit_gram_EE": (shape.n_experts, shape.n_experts),
            "attention_input_square_D": (shape.hidden_size,),
            "attention_output_input_square": (shape.n_heads * shape.head_dim,),
        }
        scalars = ("n_tokens", "moe_cosine_sum", "block_cosine_sum")
        return cls(
            **{
                field.name: torch.zeros(
                    sizes.get(field.name, () if field.name in scalars else (shape.n_experts,)), dtype=torch.float64
                )
                for field in fields(cls)
            }
        )

    def reap_scores(self) -> torch.Tensor:
        """REAP saliency: the mean over T_e of g ||f||, 0 for an expert that no token chose: float64 [E].

        Lasby et al., "REAP the Experts" (arXiv 2510.13999). The gates are the ones that were applied: normalised over
        the top-k where the model normalises them.
        """
        return self.gate_norm_sum_E / self.count_E.clamp_min(1)


class StatisticsCollector:
    """Gathers :class:`LayerStatistics` while a :class:`~compressors.model.streaming.StreamedModel` runs.

    Give :meth:`observe` to a ``TokenGroup``; afterwards ``layers`` holds one entry per layer.
    """

    def __init__(self, shape: MoeShape) -> None:
        self._shape = shape
        self.layers = [LayerStatistics.zeros(shape) for _ in range(shape.n_layers)]

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer while it runs."""
        family = self._shape.family
        sums = self.layers[index]
        experts = layer.get_submodule(family.experts_module)
        experts.observer = _ExpertSums(sums)  # type: ignore[assignment]
        hooks = [
            layer.get_submodule(family.router_module).register_forward_hook(_router_hook(sums)),
            layer.get_submodule("self_attn.q_proj").register_forward_hook(_square_hook(sums.attention_input_square_D)),
            layer.get_submodule("self_attn.o_proj").register_forward_hook(
                _square_hook(sums.attention_output_input_square)
            ),
            *_cosine_hooks(layer, sums),
        ]
        try:
            yield
        finally:
            del experts.observer
            for hook in hooks:
                hook.remove()


class _ExpertSums:
    """The observer of one layer's experts."""

    def __init__(self, sums: LayerStatistics) -> None:
        self._sums = sums

    def __call__(
        self,
        expert: int,
        inputs_nD: torch.Tensor,
        gates_n: torch.Tensor,
        hidden_nF: torch.Tensor,
        outputs_nD: torch.Tensor,
    ) -> None:
        sums = self._sums
        norms = outputs_nD.norm(dim=-1).double()
        gates = gates_n.double()
        sums.count_E[expert] += len(gates)
        sums.gate_sum_E[expert] += gates.sum()
        sums.norm_sum_E[expert] += norms.sum()
        sums.gate_norm_sum_E[expert] += (gates * norms).sum()
        sums.norm_square_sum_E[expert] += norms.square().sum()
        sums.norm_max_E[expert] = torch.maximum(sums.norm_max_E[expert], norms.max())
        sums.output_max_E[expert] = torch.maximum(sums.output_max_E[expert], outputs_nD.abs().max().double())
        sums.output_sum_ED[expert] += outputs_nD.sum(0).double()
        sums.gate_up_input_square_ED[expert] += inputs_nD.square().sum(0).double()
        sums.down_input_square_EF[expert] += hidden_nF.square().sum(0).double()


def _router_hook(sums: LayerStatistics) -> Any:
    def hook(_module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        logits_TE = outputs[0].float()
        sums.n_tokens += len(logits_TE)
        sums.router_logit_gram_EE.add_((logits_TE.T @ logits_TE).double())
        sums.router_probability_sum_E.add_(logits_TE.softmax(-1).sum(0).double())

    return hook


def _square_hook(total: torch.Tensor) -> Any:
    """Adds the squares of a linear layer's inputs to ``total``."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        total.add_(inputs[0].flatten(0, -2).square().sum(0).double())

    return hook


def _cosine_hooks(layer: nn.Module, sums: LayerStatistics) -> list[Any]:
    before_moe: list[torch.Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        before_moe.append(inputs[0])

    def compare(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sums.moe_cosine_sum.add_(functional.cosine_similarity(before_moe.pop(), output, dim=-1).sum().double())
        sums.block_cosine_sum.add_(functional.cosine_similarity(inputs[0], output, dim=-1).sum().double())

    return [
        layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(remember),
        layer.register_forward_hook(compare),
    ]


def save_statistics(layers: list[LayerStatistics], path: Path) -> None:
    """Writes all layers' statistics into one safetensors file."""
    tensors = {
        f"layers.{index}.{field.name}": getattr(layer, field.name)
        for index, layer in enumerate(layers)
        for field in fields(LayerStatistics)
    }
    save_file(tensors, path)


def load_statistics(path: Path) -> list[LayerStatistics]:
    """The inverse of :func:`save_statistics`.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the statistics in {path} cannot be read ({error}); remove the file to gather them again"
        ) from None
    n_layers = len(tensors) // len(fields(LayerStatistics))
    return [
        LayerStatistics(**{field.name: tensors[f"layers.{index}.{field.name}"] for field in fields(LayerStatistics)})
        for index in range(n_layers)
    ]


def importance(layers: list[LayerStatistics], experts: ExpertMap) -> Importance:
    """The importance matrix for a student: sliced with the same indices as its experts.

    An expert that no calibration token chose has all zeros, which quantizers read as "all columns alike".
    """
    found: Importance = {}
    for index, layer in enumerate(layers):
        kept = list(experts.kept[index])
        attention = (layer.attention_input_square_D / layer.n_tokens).float()
        counts = layer.count_E[kept, None].clamp_min(1)
        gate_up = (layer.gate_up_input_square_ED[kept] / counts).float()
        found[Role.QUERY, index] = found[Role.KEY, index] = found[Role.VALUE, index] = attention
        found[Role.ATTENTION_OUTPUT, index] = (layer.attention_output_input_square / layer.n_tokens).float()
        found[Role.EXPERT_GATE, index] = found[Role.EXPERT_UP, index] = gate_up
        found[Role.EXPERT_DOWN, index] = (layer.down_input_square_EF[kept] / counts).float()
    return found

"""One pass over the calibration tokens that gathers what every criterion needs.

Routed experts only: an expert is run on the tokens that chose it, and never on others. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.parallel import reduce_max, reduce_sum
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.sources.student import ExpertMap

__all__ = [
    "Importance",
    "LayerStatistics",
    "StatisticsCollector",
    "StoredStatistics",
    "importance",
    "importance_of_kept",
    "save_statistics",
]

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
    def zeros(cls, spec: ModelSpec, device: torch.device | None = None) -> LayerStatistics:
        """Nothing seen yet of a layer of this shape."""
        sizes: dict[str, tuple[int, ...]] = {
            "output_sum_ED": (spec.n_experts, spec.hidden_size),
            "gate_up_input_square_ED": (spec.n_experts, spec.hidden_size),
            "down_input_square_EF": (spec.n_experts, spec.expert_width),
            "router_logit_gram_EE": (spec.n_experts, spec.n_experts),
            "attention_input_square_D": (spec.hidden_size,),
            "attention_output_input_square": (spec.n_heads * spec.head_dim,),
        }
        scalars = ("n_tokens", "moe_cosine_sum", "block_cosine_sum")
        return cls(
            **{
                field.name: torch.zeros(
                    sizes.get(field.name, () if field.name in scalars else (spec.n_experts,)),
                    dtype=torch.float64,
                    device=device,
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
    """Gathers :class:`LayerStatistics` while a :class:`~compressors.model.running.streaming.StreamedModel` runs.

    Give :meth:`observe` to a ``TokenGroup`` and :meth:`take` each layer's statistics when it is done.
    """

    def __init__(self, spec: ModelSpec, device: torch.device | None = None) -> None:
        self._spec = spec
        self._device = device
        self._layers: dict[int, LayerStatistics] = {}

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer while it runs."""
        described = self._spec.layers[index]
        if index not in self._layers:
            self._layers[index] = LayerStatistics.zeros(self._spec.layer(index), self._device)
        sums = self._layers[index]
        hooks = [
            layer.get_submodule("self_attn.q_proj").register_forward_hook(_square_hook(sums.attention_input_square_D)),
            layer.get_submodule("self_attn.o_proj").register_forward_hook(
                _square_hook(sums.attention_output_input_square)
            ),
            *_cosine_hooks(layer, sums),
        ]
        routed = described.routed
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            if routed is not None:
                experts = layer.get_submodule(routed.experts_module)
                experts.observer = _ExpertSums(sums)  # type: ignore[assignment]
                stack.callback(delattr, experts, "observer")
                stack.enter_context(watching(layer, routed, partial(_add_call, sums)))
            yield

    def take(self, index: int) -> LayerStatistics:
        """A finished layer's statistics, over the tokens of all processes; the collector forgets them."""
        sums = self._layers.pop(index, None) or LayerStatistics.zeros(self._spec.layer(index))
        values = {field.name: getattr(sums, field.name).cpu() for field in fields(LayerStatistics)}
        reduce_sum(value for name, value in values.items() if name not in _MAXIMA)
        reduce_max(value for name, value in values.items() if name in _MAXIMA)
        return LayerStatistics(**values)


_MAXIMA = frozenset({"norm_max_E", "output_max_E"})


class _ExpertSums:
    """The observer of one layer's experts."""

    def __init__(self, sums: LayerStatistics) -> None:
        self._sums = sums

    def __call__(self, expert: int, gates_n: torch.Tensor, hidden_nF: torch.Tensor, outputs_nD: torch.Tensor) -> None:
        sums = self._sums
        # torch adds up in float32 whatever the dtype; asking for it would copy every array first
        norms = torch.linalg.vector_norm(outputs_nD, dim=-1).float()
        sums.norm_sum_E[expert] += norms.sum()
        sums.gate_norm_sum_E[expert] += (gates_n * norms).sum()
        sums.norm_square_sum_E[expert] += norms.square().sum()
        sums.norm_max_E[expert] = torch.maximum(sums.norm_max_E[expert], norms.max())
        lowest, highest = torch.aminmax(outputs_nD)
        sums.output_max_E[expert] = torch.maximum(sums.output_max_E[expert], torch.maximum(-lowest, highest).double())
        sums.output_sum_ED[expert] += outputs_nD.sum(0)
        sums.down_input_square_EF[expert] += hidden_nF.square().sum(0)


def _add_call(sums: LayerStatistics, call: RoutedCall) -> None:
    """Adds what one call of a layer's experts tells."""
    logits_TE = call.logits_TE
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, call.chosen_TK, 1.0)
    gates_TE = torch.zeros_like(logits_TE).scatter_(1, call.chosen_TK, call.weights_TK.float())
    sums.count_E.add_(chosen_TE.sum(0))
    sums.gate_sum_E.add_(gates_TE.sum(0))
    # one product for all experts: their tokens' squares, summed
    sums.gate_up_input_square_ED.add_(chosen_TE.T @ call.hidden_TD.float().square())
    sums.router_logit_gram_EE.add_(logits_TE.T @ logits_TE)
    sums.router_probability_sum_E.add_(logits_TE.softmax(-1).sum(0))


def _square_hook(total: torch.Tensor) -> Any:
    """Adds the squares of a linear layer's inputs to ``total``."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        total.add_(inputs[0].flatten(0, -2).square().sum(0))

    return hook


def _cosine_hooks(layer: nn.Module, sums: LayerStatistics) -> list[Any]:
    before_moe: list[torch.Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        before_moe.append(inputs[0])

    def compare(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output_norms = torch.linalg.vector_norm(output, dim=-1).float()
        sums.n_tokens += output_norms.numel()
        for total, before in ((sums.moe_cosine_sum, before_moe.pop()), (sums.block_cosine_sum, inputs[0])):
            products = (before * output).sum(-1).float()
            norms = torch.linalg.vector_norm(before, dim=-1).float() * output_norms
            total.add_((products / norms.clamp_min(1e-30)).sum())

    return [
        layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(remember),
        layer.register_forward_hook(compare),
    ]


def save_statistics(statistics: LayerStatistics, folder: Path, layer: int) -> None:
    """Writes one layer's statistics into its file of the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({field.name: getattr(statistics, field.name) for field in fields(LayerStatistics)}, _path(folder, layer))


class StoredStatistics(Sequence[LayerStatistics]):
    """All layers' statistics, each read when it is asked for.

    Raises:
        InputError: on access, a file is missing or damaged.
    """

    def __init__(self, folder: Path, n_layers: int) -> None:
        self._folder = folder
        self._n_layers = n_layers

    def __len__(self) -> int:
        return self._n_layers

    @overload
    def __getitem__(self, index: int) -> LayerStatistics: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerStatistics]: ...

    def __getitem__(self, index: int | slice) -> LayerStatistics | list[LayerStatistics]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        path = _path(self._folder, index % len(self))
        try:
            tensors = load_file(path)
            return LayerStatistics(**{field.name: tensors[field.name] for field in fields(LayerStatistics)})
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"the statistics in {path} cannot be read ({error}); remove the folder to gather them again"
            ) from None


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


_PRIOR_TOKENS = 16
"""Tokens that every expert's own are mixed with. Over both trained models, 13 to 2,000 tokens an expert, the kernels'
errors on held-out inputs fall by up to 1 % where experts have fewer than a hundred, and change by at most 0.2 % where
they have more; 64 tokens harm those."""


def importance(layers: Sequence[LayerStatistics], experts: ExpertMap) -> Importance:
    """The importance matrix for a student whose experts are the teacher's own: sliced with the same indices.

    An expert with few tokens says little of its inputs, so 16 more are added: for gate and up, which all experts of a
    layer give the same inputs to, tokens of the layer's mean; for down, whose inputs are the expert's own, tokens that
    weigh all columns alike. A down projection that no calibration token reached has all zeros, which quantizers read as
    "all columns alike".

    Args:
        layers: by layer of the model that was watched: the teacher, or a student.
        experts: the student in terms of that model; :meth:`ExpertMap.identity` if it is the one that was watched.
    """
    found: Importance = {}
    for index, came_from in enumerate(experts.layers):
        layer = layers[came_from.source]
        attention = (layer.attention_input_square_D / layer.n_tokens).float()
        found[Role.QUERY, index] = found[Role.KEY, index] = found[Role.VALUE, index] = attention
        found[Role.ATTENTION_OUTPUT, index] = (layer.attention_output_input_square / layer.n_tokens).float()
        gate_up, down = layer.gate_up_input_square_ED, layer.down_input_square_EF
        layer_mean_D = gate_up.sum(0) / layer.count_E.sum().clamp_min(1)
        own_mean_E1 = down.mean(1, keepdim=True) / layer.count_E[:, None].clamp_min(1)
        kept = list(came_from.kept)
        found[Role.EXPERT_GATE, index] = found[Role.EXPERT_UP, index] = _mixed(gate_up, layer, layer_mean_D)[kept]
        found[Role.EXPERT_DOWN, index] = _mixed(down, layer, own_mean_E1)[kept]
    return found


def _mixed(squares_EN: torch.Tensor, layer: LayerStatistics, prior: torch.Tensor) -> torch.Tensor:
    """The mean squares of each expert's own tokens and the added ones: float32 [E, N]."""
    return ((squares_EN + _PRIOR_TOKENS * prior) / (layer.count_E[:, None] + _PRIOR_TOKENS)).float()


def importance_of_kept(original: Importance, experts: ExpertMap) -> Importance:
    """The part of another model's importance matrix, such as one from a file, that a student's own tensors have.

    Args:
        original: of the model that the student was made of.
        experts: the student in terms of that model; each of its experts is one of that model's, of the same width.
    """
    found = {key: values for key, values in original.items() if key[1] is None}
    for index, came_from in enumerate(experts.layers):
        assert came_from.width is None and all(len(group) == 1 for group in came_from.groups)
        for (role, layer), values in original.items():
            if layer == came_from.source:
                found[role, index] = values[list(came_from.kept)] if role.is_expert else values
    return found

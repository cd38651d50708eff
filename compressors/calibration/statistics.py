"""Gathers the sums that every criterion needs in one pass over the calibration tokens.

Only routed tokens count: an expert runs on the tokens that chose it, and never on others. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from compressors.calibration.matrix_inputs import watching_inputs
from compressors.calibration.sizes import input_sizes, matrices_beside_experts, sum_sizes
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import TensorSpec
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
numbering. A matrix that is absent is quantized without importance."""


@dataclass
class LayerStatistics:
    """Sums over one layer's calibration tokens; T_e are the tokens that chose expert e, g its gate, f its output.

    A layer without routed experts has E = 0.
    """

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
    router_probability_sum_E: torch.Tensor  # sum of the probabilities of each, chosen or not, over all tokens
    moe_cosine_sum: torch.Tensor  # cos(x, x + MoE(norm(x))): 1 means that the feed-forward changes nothing
    block_cosine_sum: torch.Tensor  # cos(layer input, layer output)
    input_squares: dict[Role, torch.Tensor]  # sums of squares of the inputs of all other matrices, by input

    @classmethod
    def zeros(cls, layer: LayerSpec, device: torch.device | None = None) -> LayerStatistics:
        """Returns the sums of a layer before any token."""

        def zeros(size: tuple[int, ...]) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(
            **{name: zeros(size) for name, size in sum_sizes(layer).items()},
            input_squares={role: zeros((size,)) for role, size in input_sizes(layer).items()},
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums by name."""
        by_input = {_INPUT_SQUARES + role.name: squares for role, squares in self.input_squares.items()}
        return {name: getattr(self, name) for name in _SUMS} | by_input

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> LayerStatistics:
        """The inverse of :attr:`tensors`.

        Raises:
            KeyError: a sum is missing.
        """
        by_input = {
            Role[name.removeprefix(_INPUT_SQUARES)]: squares
            for name, squares in tensors.items()
            if name.startswith(_INPUT_SQUARES)
        }
        return cls(**{name: tensors[name] for name in _SUMS}, input_squares=by_input)

    @property
    def n_bytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def mean_input_squares(self, tensor: TensorSpec) -> torch.Tensor:
        """The mean squared input of each column of a matrix outside of experts: float32 [inputs]."""
        return (self.input_squares[tensor.input_role] / self.n_tokens).float()

    def reap_scores(self) -> torch.Tensor:
        """REAP saliency: the mean over T_e of g ||f||, 0 for an expert that no token chose: float64 [E].

        Lasby et al., "REAP the Experts" (arXiv 2510.13999). The gates are the ones that were applied: normalised over
        the top-k where the model normalises them.
        """
        return self.gate_norm_sum_E / self.count_E.clamp_min(1)


_INPUT_SQUARES = "input_squares."
_SUMS = tuple(field.name for field in fields(LayerStatistics) if field.name != "input_squares")
_MAXIMA = frozenset({"norm_max_E", "output_max_E"})


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
        described = self._spec.blocks[index]
        if index not in self._layers:
            self._layers[index] = LayerStatistics.zeros(described, self._device)
        sums = self._layers[index]
        with ExitStack() as stack:
            stack.enter_context(watching_inputs(layer, described, partial(_add_squares, sums)))
            stack.enter_context(_watching_cosines(layer, described, sums))
            if described.routed is not None:
                experts = layer.get_submodule(described.routed.experts_module)
                experts.observer = _ExpertSums(sums)  # type: ignore[assignment]
                stack.callback(delattr, experts, "observer")
                add = partial(_add_call, sums, described.routed.routing)
                stack.enter_context(watching(layer, described.routed, add))
            yield

    def take(self, index: int) -> LayerStatistics:
        """Returns a finished layer's statistics over the tokens of all processes, and forgets them."""
        sums = self._layers.pop(index, None) or LayerStatistics.zeros(self._spec.blocks[index])
        tensors = {name: tensor.cpu() for name, tensor in sums.tensors.items()}
        reduce_sum(tensor for name, tensor in tensors.items() if name not in _MAXIMA)
        reduce_max(tensor for name, tensor in tensors.items() if name in _MAXIMA)
        return LayerStatistics.from_tensors(tensors)


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


def _add_call(sums: LayerStatistics, routing: Routing, call: RoutedCall) -> None:
    """Adds one call of a layer's experts to the sums."""
    logits_TE = call.logits_TE
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, call.chosen_TK, 1.0)
    gates_TE = torch.zeros_like(logits_TE).scatter_(1, call.chosen_TK, call.weights_TK.float())
    sums.count_E.add_(chosen_TE.sum(0))
    sums.gate_sum_E.add_(gates_TE.sum(0))
    # one product for all experts: their tokens' squares, summed
    sums.gate_up_input_square_ED.add_(chosen_TE.T @ call.hidden_TD.float().square())
    sums.router_logit_gram_EE.add_(logits_TE.T @ logits_TE)
    sums.router_probability_sum_E.add_(routing.torch_probabilities(logits_TE).sum(0))


def _add_squares(sums: LayerStatistics, role: Role, inputs_TN: torch.Tensor) -> None:
    """Adds the squares of the inputs of the matrices that share them."""
    sums.input_squares[role].add_(inputs_TN.square().sum(0))


@contextmanager
def _watching_cosines(module: nn.Module, layer: LayerSpec, sums: LayerStatistics) -> Iterator[None]:
    """Compares what leaves the layer with what enters it, and with what enters the norm before its feed-forward."""
    before_moe: list[torch.Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        before_moe.append(inputs[0].flatten(0, -2))

    def compare(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # without a feed-forward nothing is added to what leaves
        output = output.flatten(0, -2)
        states = (before_moe.pop() if before_moe else output, inputs[0].flatten(0, -2))
        output_norms = torch.linalg.vector_norm(output, dim=-1).float()
        sums.n_tokens += output_norms.numel()
        for total, before in zip((sums.moe_cosine_sum, sums.block_cosine_sum), states, strict=True):
            products = (before * output).sum(-1).float()
            norms = torch.linalg.vector_norm(before, dim=-1).float() * output_norms
            total.add_((products / norms.clamp_min(1e-30)).sum())

    handles = [module.register_forward_hook(compare)]
    if Role.MOE_NORM in layer.roles:
        norm = module.get_submodule(layer.tensor(Role.MOE_NORM).submodule)
        handles.append(norm.register_forward_pre_hook(remember))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_statistics(statistics: LayerStatistics, folder: Path, layer: int) -> None:
    """Writes one layer's statistics into its file in the folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(statistics.tensors, _path(folder, layer))


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
            return LayerStatistics.from_tensors(load_file(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"the statistics in {path} cannot be read ({error}); remove the folder to gather them again"
            ) from None


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


_PRIOR_TOKENS = 16
"""Tokens that are added to every expert's own. Over both trained models, 13 to 2,000 tokens an expert, the kernels'
errors on held-out inputs fall by up to 1 % where experts have fewer than a hundred, and change by at most 0.2 % where
they have more; 64 tokens harm those."""


def importance(layers: Sequence[LayerStatistics], experts: ExpertMap, student: ModelSpec) -> Importance:
    """The importance matrix for a student whose experts are the teacher's own: sliced with the same indices.

    An expert with few tokens says little of its inputs, so 16 more are added: for gate and up, which all experts of a
    layer give the same inputs to, tokens of the layer's mean; for down, whose inputs are the expert's own, tokens that
    weigh all columns alike. A down projection that no calibration token reached has all zeros, which quantizers read as
    "all columns alike".

    Args:
        layers: the statistics of each layer of the model that was watched: the teacher, or a student.
        experts: the student in terms of that model; :meth:`ExpertMap.identity` if it is the one that was watched.
        student: the student's description.
    """
    found: Importance = {}
    for index, (came_from, described) in enumerate(zip(experts.blocks, student.blocks, strict=True)):
        layer = layers[came_from.source]
        for tensor in matrices_beside_experts(described):
            found[tensor.role, index] = layer.mean_input_squares(tensor)
        for tensor in described.expert_tensors:
            if tensor.is_quantizable:
                found[tensor.role, index] = _of_experts(layer, tensor)[list(came_from.kept)]
    return found


def _of_experts(layer: LayerStatistics, tensor: TensorSpec) -> torch.Tensor:
    """The importance of a matrix of all experts of a layer: float32 [E, inputs]."""
    gate_up, down = layer.gate_up_input_square_ED, layer.down_input_square_EF
    if tensor.role is Role.EXPERT_DOWN:
        return _mixed(down, layer, down.mean(1, keepdim=True) / layer.count_E[:, None].clamp_min(1))
    return _mixed(gate_up, layer, gate_up.sum(0) / layer.count_E.sum().clamp_min(1))


def _mixed(squares_EN: torch.Tensor, layer: LayerStatistics, prior: torch.Tensor) -> torch.Tensor:
    """The mean squares of each expert's own tokens and the added ones: float32 [E, N]."""
    return ((squares_EN + _PRIOR_TOKENS * prior) / (layer.count_E[:, None] + _PRIOR_TOKENS)).float()


def importance_of_kept(original: Importance, experts: ExpertMap) -> Importance:
    """Returns the part of another model's importance matrix, such as one from a file, that fits a student's tensors.

    Args:
        original: the importance matrix of the model that the student was made from.
        experts: the student in terms of that model; each of its experts is one of that model's, of the same width.
    """
    found = {key: values for key, values in original.items() if key[1] is None}
    for index, came_from in enumerate(experts.blocks):
        assert came_from.width is None and all(len(group) == 1 for group in came_from.groups)
        for (role, layer), values in original.items():
            if layer == came_from.source:
                found[role, index] = values[list(came_from.kept)] if role.is_expert else values
    return found

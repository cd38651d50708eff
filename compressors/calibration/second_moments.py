"""Second moments, means of x x^T, of the inputs of a student's matrices: error feedback weighs errors with them.

They come from layer inputs (:mod:`compressors.calibration.layer_inputs`), one decoder layer at a time. The layer
runs once over them without its experts, a few token blocks in each thread, and the experts' inputs are kept in 16 bits.
The moments of one expert are computed from its tokens' rows on request: only those in use lie in memory, experts can be
worked on in any number of threads, and an expert's weights are needed only for the inputs of its down projection.

Sums are float32; their bits do not depend on the number of threads. Letters as in
:mod:`compressors.model.description.spec`; N inputs of a matrix, n tokens of one expert.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from compressors.calibration.layer_inputs import InputsOfLayers
from compressors.calibration.matrix_inputs import watching_inputs
from compressors.calibration.sizes import ROWS_AT_ONCE, TOKENS_AT_ONCE
from compressors.model.description.feed_forward import Routed
from compressors.model.description.gate_order import gates_first
from compressors.model.description.glu import Glu
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.running.layers import LayerWeights
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.model.threads import in_order, one_thread_each

__all__ = ["ExpertInputs", "LayerMoments", "Moments", "SecondMoments"]

_COLUMNS_AT_ONCE = 256  # fewer would save a few more products, but make them slower

_EXPERTS = Role.EXPERT_GATE  # the role of the input that all experts of a layer have

_Part = TypeVar("_Part")
_Reader = Callable[[slice], torch.Tensor]


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs of one matrix."""

    mean_NN: torch.Tensor  # float32: the mean of x x^T; zeros if no token was seen
    n_tokens: int  # tokens in the mean

    @classmethod
    def of_sum(cls, total_NN: torch.Tensor, n_tokens: int) -> Moments:
        """Turns the sum into the mean, in place."""
        return cls(total_NN.div_(max(n_tokens, 1)), n_tokens)


@dataclass(frozen=True)
class LayerMoments:
    """The second moments of the inputs of one layer's matrices."""

    matrices: Mapping[Role, Moments]  # of matrices outside of experts, by :attr:`TensorSpec.input_role`
    experts: ExpertInputs | None  # None: the layer has none


class SecondMoments:
    """The second moments of a student's inputs.

    Args:
        student: the model.
        inputs: the inputs of its layers.
        dtype: dtype in which layers run.
        threads: groups of token blocks that are worked on at a time.
    """

    def __init__(
        self, student: Student, inputs: InputsOfLayers, *, dtype: torch.dtype = torch.float32, threads: int = 1
    ) -> None:
        self._student = student
        self._inputs = inputs
        self._dtype = dtype
        self._threads = threads
        self._model = StreamedModel(student)

    @property
    def spec(self) -> ModelSpec:
        """The student's description."""
        return self._student.spec

    def layer(self, index: int) -> LayerMoments:
        """The moments of one decoder layer, which runs over all stored tokens, its experts left out.

        Raises:
            InputError: the layer's inputs or weights cannot be read.
        """
        read = self._inputs.reader(index)
        seen, described = _Seen(), self.spec.layers[index]
        n_blocks, n_block_tokens, _ = self._inputs.shape
        weights = _without_experts(self._student, index)
        sums = _LayerSums(n_blocks * n_block_tokens, weights.others.get(Role.EXPERT_GATE_UP_BIAS))
        with self._model.layer(index, weights, self._dtype) as layer, _watched(layer, described, seen):
            for part in self._in_parts(partial(self._run, layer, read, seen)):
                sums.add(part)
        return sums.moments(described.routed)

    def head(self) -> Moments:
        """The moments of the head's inputs, which are the final norm's outputs.

        Raises:
            InputError: they cannot be read.
        """
        read = self._inputs.reader(self.spec.n_layers)
        weight_D = self.spec.tensor(Role.FINAL_NORM).scales(self._student.tensor(Role.FINAL_NORM))
        total_DD = torch.zeros(2 * weight_D.shape)
        for part_DD in self._in_parts(partial(self._head_part, weight_D, read)):
            total_DD += part_DD
        n_blocks, n_block_tokens, _ = self._inputs.shape
        return Moments.of_sum(total_DD, n_blocks * n_block_tokens)

    def _in_parts(self, work: Callable[[slice], _Part]) -> Iterator[_Part]:
        """Yields the results of ``work`` on a few blocks at a time, in the order of the blocks."""
        n_blocks, n_block_tokens, _ = self._inputs.shape
        step = max(1, TOKENS_AT_ONCE // n_block_tokens)
        groups = (slice(first, min(first + step, n_blocks)) for first in range(0, n_blocks, step))
        with one_thread_each(self._threads) as pool:
            yield from in_order(pool, (partial(work, blocks) for blocks in groups), self._threads)

    @torch.no_grad()
    def _run(self, layer: nn.Module, read: _Reader, seen: _Seen, blocks: slice) -> _LayerPart:
        self._model.run_layer(layer, read(blocks).to(self._dtype))
        products: dict[Role, torch.Tensor] = {role: _products(rows) for role, rows in seen.matrices.items()}
        if seen.experts_TD is None or seen.chosen_TK is None:
            return _LayerPart(products, None)
        products[_EXPERTS] = _products(seen.experts_TD)
        return _LayerPart(products, (seen.experts_TD, seen.chosen_TK))

    def _head_part(self, weight_D: torch.Tensor, read: _Reader, blocks: slice) -> torch.Tensor:
        states_TD = read(blocks).flatten(0, 1).float()
        return _products(functional.rms_norm(states_TD, weight_D.shape, weight_D, self.spec.rms_norm_eps))


class ExpertInputs:
    """The inputs of one layer's experts.

    An expert's moments have the same bits wherever torch computes with one thread, as in :func:`one_thread_each`.

    Args:
        inputs_TD: all tokens' rows, in 16 bits.
        chosen_TK: the experts that each token goes to.
        glu: the function between an expert's products.
        all_tokens: the moments of all rows.
        bias_EF: the biases of gate and up, [E, 2F], gates first; None: there are none.
    """

    def __init__(
        self,
        inputs_TD: torch.Tensor,
        chosen_TK: torch.Tensor,
        glu: Glu,
        all_tokens: Moments,
        bias_EF: torch.Tensor | None = None,
    ) -> None:
        self._inputs_TD = inputs_TD
        self._chosen_TK = chosen_TK
        self._glu = glu
        self.all_tokens = all_tokens
        self._bias_EF = bias_EF

    def gate_up(self, expert: int) -> Moments:
        """The moments of the inputs of an expert's gate and up projection: over its tokens alone."""
        tokens_n = self._tokens(expert)
        rows = (self._inputs_TD[part] for part in tokens_n.split(ROWS_AT_ONCE))
        return Moments.of_sum(_sum_of_products(rows, self._inputs_TD.shape[1]), len(tokens_n))

    def down(self, expert: int, *of_inputs: torch.Tensor) -> Moments:
        """The moments of the inputs of its down projection, computed from its tokens with the given gate and up.

        Args:
            expert: the expert.
            of_inputs: its gate and up, or up alone where there is no gate.
        """
        tokens_n, matrices = self._tokens(expert), [matrix_FD.float() for matrix_FD in of_inputs]
        biases = [None] * len(matrices) if self._bias_EF is None else self._bias_EF[expert].float().chunk(len(matrices))
        rows = (
            self._hidden([functional.linear(part_nD, *each) for each in zip(matrices, biases, strict=True)])
            for part_nD in (self._inputs_TD[part].float() for part in tokens_n.split(ROWS_AT_ONCE))
        )
        return Moments.of_sum(_sum_of_products(rows, len(matrices[0])), len(tokens_n))

    def _hidden(self, products: Sequence[torch.Tensor]) -> torch.Tensor:
        *gate_nF, up_nF = products
        return self._glu.torch_apply(gate_nF[0] if gate_nF else None, up_nF)

    def _tokens(self, expert: int) -> torch.Tensor:
        return (self._chosen_TK == expert).any(1).nonzero().flatten()


class _Seen(threading.local):
    """The tensors that a run of the layer in this thread has recorded."""

    experts_TD: torch.Tensor | None = None
    chosen_TK: torch.Tensor | None = None

    def __init__(self) -> None:  # once in each thread
        self.matrices: dict[Role, torch.Tensor] = {}


@dataclass(frozen=True)
class _LayerPart:
    """The products that a few token blocks add to a layer's sums, and the inputs that they give to its experts."""

    products: dict[Role, torch.Tensor]  # by input
    experts: tuple[torch.Tensor, torch.Tensor] | None  # inputs [T, D] in 16 bits, and chosen experts [T, K]


class _LayerSums:
    """The parts of one layer, added up in their order."""

    def __init__(self, n_tokens: int, gate_up_bias_EF: torch.Tensor | None) -> None:
        self._n_tokens = n_tokens
        self._bias_EF = None if gate_up_bias_EF is None else gates_first(gate_up_bias_EF)
        self._n_added = 0
        self._totals: dict[Role, torch.Tensor] = {}
        self._experts: list[torch.Tensor] = []

    def add(self, part: _LayerPart) -> None:
        """Adds the next part."""
        for role, product in part.products.items():
            self._totals.setdefault(role, torch.zeros_like(product)).add_(product)
        if part.experts is not None:
            self._experts = self._experts or [rows.new_empty(self._n_tokens, rows.shape[1]) for rows in part.experts]
            for whole, rows in zip(self._experts, part.experts, strict=True):
                whole[self._n_added : self._n_added + len(rows)] = rows
            self._n_added += len(part.experts[0])

    def moments(self, routed: Routed | None) -> LayerMoments:
        """Turns the sums into the layer's moments."""
        found = {role: Moments.of_sum(total, self._n_tokens) for role, total in self._totals.items()}
        if routed is None:
            return LayerMoments(found, None)
        inputs_TD, chosen_TK = self._experts
        experts = ExpertInputs(inputs_TD, chosen_TK, routed.glu, found.pop(_EXPERTS), self._bias_EF)
        return LayerMoments(found, experts)


@contextmanager
def _watched(module: nn.Module, layer: LayerSpec, seen: _Seen) -> Iterator[None]:
    """Records the inputs of the layer's matrices in ``seen``; experts do nothing meanwhile."""

    def look(role: Role, rows_TN: torch.Tensor) -> None:
        seen.matrices[role] = rows_TN

    def stand_in(inputs_TD: torch.Tensor, chosen_TK: torch.Tensor, _gates_TK: torch.Tensor) -> torch.Tensor:
        seen.experts_TD, seen.chosen_TK = inputs_TD.bfloat16(), chosen_TK.to(torch.int16)
        return torch.zeros_like(inputs_TD)

    experts = None if layer.routed is None else module.get_submodule(layer.routed.experts_module)
    if experts is not None:
        experts.forward = stand_in
    try:
        with watching_inputs(module, layer, look):
            yield
    finally:
        if experts is not None:
            del experts.forward


def _without_experts(student: Student, index: int) -> LayerWeights:
    """The layer's weights, with one zero in place of all its experts' values."""
    layer = student.spec.layers[index]
    zero = torch.zeros(1, 1, 1, dtype=student.expert_dtype)
    return LayerWeights(
        zero.expand(layer.n_experts, layer.expert_input_rows, layer.expert_size),
        zero.expand(layer.n_experts, layer.expert_size, layer.expert_width),
        {tensor.role: student.tensor(tensor.role, index) for tensor in layer.shared_tensors},
    )


def _sum_of_products(parts: Iterable[torch.Tensor], size: int) -> torch.Tensor:
    """The sum of x x^T over the rows of all parts: float32."""
    total_NN = torch.zeros(size, size)
    for part_nN in parts:
        total_NN += _products(part_nN)
    return total_NN


def _products(rows_nN: torch.Tensor) -> torch.Tensor:
    """x x^T summed over the rows: float32. Products of two columns are the same both ways, so most are made once."""
    rows_nN = rows_nN.float()
    products_NN = rows_nN.new_empty(2 * rows_nN.shape[1:])
    for first in range(0, len(products_NN), _COLUMNS_AT_ONCE):
        columns, others = slice(first, first + _COLUMNS_AT_ONCE), slice(first + _COLUMNS_AT_ONCE, None)
        products_NN[columns, first:] = rows_nN[:, columns].T @ rows_nN[:, first:]
        products_NN[others, columns] = products_NN[columns, others].T
    return products_NN

"""One layer's MoE block as compressing methods see it: its weights, the evidence about its tokens, and the result.

A method is a function from (block, evidence, target) to a :class:`CompressedBlock`. It works on one layer, in memory,
in float32, and does not know where weights come from or go. Letters as in
:mod:`compressors.model.description.spec`; G experts that are left, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch.nn import functional

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.glu import Glu
from compressors.model.description.routing import Routing
from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.shrink.needs import Needs

__all__ = [
    "CompressedBlock",
    "Evidence",
    "KeptNeurons",
    "Method",
    "MoeBlock",
    "Needs",
    "Routes",
    "SharedParts",
    "second_moment",
]


@dataclass(frozen=True)
class Routes:
    """A router's decisions for each token."""

    logits_TE: torch.Tensor
    chosen_TK: torch.Tensor  # int64, by falling logit
    gates_TK: torch.Tensor  # as they are applied

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose an expert (indices [n], ascending), and its gate for each of them [n]."""
        tokens, slots = (self.chosen_TK == expert).nonzero(as_tuple=True)
        return tokens, self.gates_TK[tokens, slots]


_SWIGLU = Glu()


@dataclass(frozen=True)
class MoeBlock:
    """Router and routed experts of one layer, without an expert that every token goes through.

    Experts are held in storage dtype and widened to float32 one at a time.
    """

    router_ED: torch.Tensor  # float32, like all biases
    gate_up_EFD: torch.Tensor  # [E, 2F, D], gate rows first; [E, F, D] of experts without a gate
    down_EDF: torch.Tensor
    top_k: int
    routing: Routing
    glu: Glu = _SWIGLU
    router_bias_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None  # added to the scores for the choice
    gate_up_bias_EF: torch.Tensor | None = None  # [E, 2F], gate first
    down_bias_ED: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None  # multiplies the gates at the end

    @property
    def n_experts(self) -> int:
        """The number of experts."""
        return len(self.router_ED)

    @property
    def width(self) -> int:
        """The number of intermediate neurons of each expert."""
        return self.down_EDF.shape[-1]

    @property
    def size(self) -> int:
        """The number of values that an expert reads, and gives."""
        return self.down_EDF.shape[1]

    @property
    def n_inputs(self) -> int:
        """The number of matrices that an expert's input is multiplied with: gate and up, or up alone."""
        return 2 if self.glu.is_gated else 1

    def input_matrices(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Gate and up, or up alone: float32 [F, D] each."""
        return torch.split(self.gate_up_EFD[expert].float(), self.width)

    def gate(self, expert: int) -> torch.Tensor:
        """Gate projection: float32 [F, D]."""
        assert self.glu.is_gated, "the experts have no gate"
        return self.gate_up_EFD[expert, : self.width].float()

    def up(self, expert: int) -> torch.Tensor:
        """Up projection: float32 [F, D]."""
        return self.gate_up_EFD[expert, -self.width :].float()

    def down(self, expert: int) -> torch.Tensor:
        """Down projection: float32 [D, F]."""
        return self.down_EDF[expert].float()

    def logits(self, inputs_TD: torch.Tensor) -> torch.Tensor:
        """The router's logits: float32 [T, E]."""
        return functional.linear(inputs_TD.float(), self.router_ED, self.router_bias_E)

    def route(self, inputs_TD: torch.Tensor) -> Routes:
        """The ``top_k`` experts of each token and their gates, by the model's rule; the inputs are the router's."""
        logits_TE = self.logits(inputs_TD)
        chosen_TK = self.routing.torch_choose(logits_TE, self.top_k, self.selection_bias_E)
        return Routes(logits_TE, chosen_TK, self.gates(logits_TE, chosen_TK))

    def gates(self, logits_TE: torch.Tensor, chosen_Tn: torch.Tensor) -> torch.Tensor:
        """The gates of chosen experts: float32 [T, n]."""
        return self.routing.torch_weights(logits_TE, chosen_Tn, self.expert_scale_E)

    def hidden(self, expert: int, inputs_nD: torch.Tensor) -> torch.Tensor:
        """Intermediate activations of an expert: float32 [n, F]."""
        inputs_nD = inputs_nD.float()
        gate_bias_F, up_bias_F = self._gate_and_up_bias(expert)
        gate_nF = functional.linear(inputs_nD, self.gate(expert), gate_bias_F) if self.glu.is_gated else None
        return self.glu.torch_apply(gate_nF, functional.linear(inputs_nD, self.up(expert), up_bias_F))

    def output(self, expert: int, inputs_nD: torch.Tensor) -> torch.Tensor:
        """Ungated output of an expert: float32 [n, D]."""
        bias_D = None if self.down_bias_ED is None else self.down_bias_ED[expert]
        return functional.linear(self.hidden(expert, inputs_nD), self.down(expert), bias_D)

    def forward(self, inputs_TD: torch.Tensor, router_inputs_TD: torch.Tensor | None = None) -> torch.Tensor:
        """The block's output, the gate-weighted sum of the chosen experts' outputs: float32 [T, D].

        Args:
            inputs_TD: the experts' inputs.
            router_inputs_TD: the router's; None: the same.
        """
        routes = self.route(inputs_TD if router_inputs_TD is None else router_inputs_TD)
        output_TD = torch.zeros(inputs_TD.shape, dtype=torch.float32)
        for expert in range(self.n_experts):
            tokens, gates_n = routes.of_expert(expert)
            output_TD.index_add_(0, tokens, gates_n[:, None] * self.output(expert, inputs_TD[tokens]))
        return output_TD

    def keep(self, experts: Sequence[int]) -> MoeBlock:
        """The block with these experts alone, in this order; top-k never exceeds their number.

        Raises:
            InputError: the router chooses groups of experts, and groups would differ in size.
        """
        kept = list(experts)
        self._check_groups(kept)
        of_experts = {name: value[kept] for name in _OF_EXPERTS if (value := getattr(self, name)) is not None}
        return replace(self, **of_experts, top_k=min(self.top_k, len(kept)))

    def group_of(self, expert: int) -> int:
        """The index of an expert's group, where the router chooses groups first."""
        return expert * self.routing.n_groups // self.n_experts

    def _check_groups(self, kept: Sequence[int]) -> None:
        """Refuses experts that leave groups of different sizes; a group is a run of neighbours."""
        n_groups = self.routing.n_groups
        groups = [self.group_of(expert) for expert in kept]
        if groups != [place * n_groups // len(kept) for place in range(len(kept))] or len(kept) % n_groups:
            raise InputError(
                f"the router chooses among {n_groups} groups of neighbouring experts, which must stay equal in size, "
                f"but the experts {list(kept)} would be kept: keep equally many of each group"
            )

    def _gate_and_up_bias(self, expert: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.gate_up_bias_EF is None:
            return None, None
        return self.gate_up_bias_EF[expert, : self.width], self.gate_up_bias_EF[expert, self.width :]


_OF_EXPERTS = (
    "router_ED",
    "gate_up_EFD",
    "down_EDF",
    "router_bias_E",
    "selection_bias_E",
    "gate_up_bias_EF",
    "down_bias_ED",
    "expert_scale_E",
)


@dataclass(frozen=True)
class Evidence:
    """The evidence of the calibration text about one block."""

    statistics: LayerStatistics
    inputs_TD: torch.Tensor | None  # float32: states that enter the experts, of sample tokens
    router_inputs_TD: torch.Tensor | None = None  # float32: those that enter the router; None: the same

    @property
    def sample_TD(self) -> torch.Tensor:
        """The sample, for methods that need inputs."""
        assert self.inputs_TD is not None, "the method did not say that it needs inputs"
        return self.inputs_TD

    @property
    def router_sample_TD(self) -> torch.Tensor:
        """The router's inputs of the sample tokens."""
        return self.sample_TD if self.router_inputs_TD is None else self.router_inputs_TD


@dataclass(frozen=True)
class SharedParts:
    """The matrices of experts that stand on shared bases, apart; matrices are in the order gate, up, down."""

    shared: SharedBases
    bases: tuple[tuple[torch.Tensor, ...], ...]  # of each base its matrices, in the experts' storage dtype
    adapters: Mapping[int, tuple[tuple[torch.Tensor, torch.Tensor], ...]]
    """Of each replaced expert A [R, I] and B [O, R] of its matrices, float32."""

    def matrix(self, expert: int, number: int) -> torch.Tensor:
        """A replaced expert's matrix, base plus B A: float32 [O, I]."""
        a_RI, b_OR = self.adapters[expert][number]
        base = self.shared.base_of[expert]
        assert base is not None, "only replaced experts are made of parts"
        return b_OR @ a_RI if base == SharedBases.ZERO else self.bases[base][number].float() + b_OR @ a_RI


@dataclass(frozen=True)
class KeptNeurons:
    """The neurons that an expert keeps of the one that it comes from, whose values it otherwise has."""

    neurons: tuple[int, ...]  # ascending
    correction_RM: torch.Tensor | None
    """Float32: the factors of the columns of down that went, which are added to those that stay; None: nothing is."""
    has_own_down: bool = False  # True if down has other values, and factors of it would take more room than it


@dataclass(frozen=True)
class CompressedBlock:
    """A method's result for a block."""

    block: MoeBlock  # experts in the student's numbering
    groups: tuple[tuple[int, ...], ...]  # [G]: the experts that each stands for, first the one that it comes from
    changed_experts: frozenset[int] = frozenset()  # those with other weights than the expert they come from
    router_changed: bool = False  # True if a row differs from that of the expert it comes from
    parts: SharedParts | None = None  # those that some of its experts are made of; None: there are none
    narrowed: Mapping[int, KeptNeurons] = field(default_factory=dict)  # the changed experts that are only narrower

    @classmethod
    def unchanged(cls, block: MoeBlock) -> CompressedBlock:
        """Returns the block as it is."""
        return cls(block, tuple((expert,) for expert in range(block.n_experts)))

    @classmethod
    def rewritten(cls, block: MoeBlock, gate_up_EFD: torch.Tensor, down_EDF: torch.Tensor) -> CompressedBlock:
        """Returns the block with other matrices for every expert; none is merged or dropped, and the router stays."""
        changed = replace(block, gate_up_EFD=gate_up_EFD, down_EDF=down_EDF)
        return replace(cls.unchanged(changed), changed_experts=frozenset(range(block.n_experts)))

    @classmethod
    def of_parts(cls, block: MoeBlock, parts: SharedParts) -> CompressedBlock:
        """Returns the block with experts put together from parts, in storage dtype; all others and the router stay."""
        gate_up_EFD, down_EDF = block.gate_up_EFD.clone(), block.down_EDF.clone()
        for expert in parts.shared.replaced:
            *of_inputs, down_DF = (parts.matrix(expert, number) for number in range(block.n_inputs + 1))
            gate_up_EFD[expert], down_EDF[expert] = torch.cat(of_inputs), down_DF
        changed = replace(block, gate_up_EFD=gate_up_EFD, down_EDF=down_EDF)
        return replace(cls.unchanged(changed), changed_experts=frozenset(parts.shared.replaced), parts=parts)


class Method(Protocol):
    """A way of shrinking a MoE block."""

    @property
    def needs(self) -> Needs:
        """The evidence that a call needs."""

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Shrinks a block; the targets (experts, width, rank) are the method's fields."""


def second_moment(inputs_nN: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over the inputs: float64 [N, N], zeros if there are none."""
    total_NN = torch.zeros(2 * inputs_nN.shape[1:], dtype=torch.float64)
    for part_nN in inputs_nN.split(_TOKENS_AT_ONCE):
        part_nN = part_nN.double()
        total_NN += part_nN.T @ part_nN
    return total_NN


_TOKENS_AT_ONCE = 4096  # tokens that are widened to float64 together

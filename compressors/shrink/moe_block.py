"""One layer's MoE block as compressing methods see it: its weights, what is known about its tokens, and what is left.

A method is a function from (block, evidence, target) to a :class:`CompressedBlock`. It works on one layer, in memory,
in float32; where weights come from and where they go is not its business. Letters as in
:mod:`compressors.model.description.spec`; G experts that are left, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import torch
from torch.nn import functional

from compressors.calibration.statistics import LayerStatistics

__all__ = ["CompressedBlock", "Evidence", "Method", "MoeBlock", "Needs", "Routes", "second_moment"]


@dataclass(frozen=True)
class Routes:
    """What a router decides for each token."""

    logits_TE: torch.Tensor
    chosen_TK: torch.Tensor  # int64, by falling logit
    gates_TK: torch.Tensor  # as they are applied

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose an expert (indices [n], ascending), and its gate for each of them [n]."""
        tokens, slots = (self.chosen_TK == expert).nonzero(as_tuple=True)
        return tokens, self.gates_TK[tokens, slots]


@dataclass(frozen=True)
class MoeBlock:
    """Router and experts of one layer: SwiGLU experts behind a softmax router.

    Experts are held in storage dtype and widened to float32 one at a time.
    """

    router_ED: torch.Tensor  # float32
    gate_up_EFD: torch.Tensor  # [E, 2F, D], gate rows first
    down_EDF: torch.Tensor
    top_k: int
    normalize_top_k: bool

    @property
    def n_experts(self) -> int:
        """Experts of the block."""
        return len(self.router_ED)

    @property
    def width(self) -> int:
        """Intermediate neurons of each expert."""
        return self.down_EDF.shape[-1]

    def gate(self, expert: int) -> torch.Tensor:
        """Gate projection: float32 [F, D]."""
        return self.gate_up_EFD[expert, : self.width].float()

    def up(self, expert: int) -> torch.Tensor:
        """Up projection: float32 [F, D]."""
        return self.gate_up_EFD[expert, self.width :].float()

    def down(self, expert: int) -> torch.Tensor:
        """Down projection: float32 [D, F]."""
        return self.down_EDF[expert].float()

    def route(self, inputs_TD: torch.Tensor) -> Routes:
        """Softmax over all experts, the ``top_k`` largest, normalised over them where the model does so."""
        logits_TE = functional.linear(inputs_TD.float(), self.router_ED)
        chosen_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1).indices
        return Routes(logits_TE, chosen_TK, self.gates(logits_TE, chosen_TK))

    def gates(self, logits_TE: torch.Tensor, chosen_Tn: torch.Tensor) -> torch.Tensor:
        """The gates of chosen experts: float32 [T, n]."""
        gates_Tn = logits_TE.softmax(-1).gather(1, chosen_Tn)
        return gates_Tn / gates_Tn.sum(-1, keepdim=True) if self.normalize_top_k else gates_Tn

    def hidden(self, expert: int, inputs_nD: torch.Tensor) -> torch.Tensor:
        """Intermediate activations of an expert, silu(gate x) * up x: float32 [n, F]."""
        inputs_nD = inputs_nD.float()
        gate_nF = functional.linear(inputs_nD, self.gate(expert))
        return functional.silu(gate_nF) * functional.linear(inputs_nD, self.up(expert))

    def output(self, expert: int, inputs_nD: torch.Tensor) -> torch.Tensor:
        """Ungated output of an expert: float32 [n, D]."""
        return functional.linear(self.hidden(expert, inputs_nD), self.down(expert))

    def forward(self, inputs_TD: torch.Tensor) -> torch.Tensor:
        """The block's output, the gate-weighted sum of the chosen experts' outputs: float32 [T, D]."""
        routes = self.route(inputs_TD)
        output_TD = torch.zeros(inputs_TD.shape, dtype=torch.float32)
        for expert in range(self.n_experts):
            tokens, gates_n = routes.of_expert(expert)
            output_TD.index_add_(0, tokens, gates_n[:, None] * self.output(expert, inputs_TD[tokens]))
        return output_TD

    def keep(self, experts: Sequence[int]) -> MoeBlock:
        """The block with these experts alone, in this order; top-k never exceeds their number."""
        kept = list(experts)
        return replace(
            self,
            router_ED=self.router_ED[kept],
            gate_up_EFD=self.gate_up_EFD[kept],
            down_EDF=self.down_EDF[kept],
            top_k=min(self.top_k, len(kept)),
        )


@dataclass(frozen=True)
class Evidence:
    """What the calibration text tells about one block."""

    statistics: LayerStatistics
    inputs_TD: torch.Tensor | None  # float32: states that enter router and experts, of sample tokens

    @property
    def sample_TD(self) -> torch.Tensor:
        """The sample, for methods that need inputs."""
        assert self.inputs_TD is not None, "the method did not say that it needs inputs"
        return self.inputs_TD


@dataclass(frozen=True)
class CompressedBlock:
    """What a method made of a block."""

    block: MoeBlock  # experts in the student's numbering
    groups: tuple[tuple[int, ...], ...]  # [G]: the experts that each stands for, the one that it comes from first
    changed_experts: frozenset[int] = frozenset()  # whose weights are no longer those of the expert they come from
    router_changed: bool = False  # a row is no longer that of the expert it comes from

    @classmethod
    def unchanged(cls, block: MoeBlock) -> CompressedBlock:
        """Nothing was done yet."""
        return cls(block, tuple((expert,) for expert in range(block.n_experts)))

    @classmethod
    def rewritten(cls, block: MoeBlock, gate_up_EFD: torch.Tensor, down_EDF: torch.Tensor) -> CompressedBlock:
        """Every expert got other matrices; none was merged or dropped, and the router is untouched."""
        changed = replace(block, gate_up_EFD=gate_up_EFD, down_EDF=down_EDF)
        return replace(cls.unchanged(changed), changed_experts=frozenset(range(block.n_experts)))


class Needs(IntEnum):
    """What a method looks at, each including those before."""

    STATISTICS = 1  # it only chooses, so weights may lie on the meta device
    WEIGHTS = 2
    INPUTS = 3  # the evidence has ``inputs_TD``


class Method(Protocol):
    """A way of shrinking a MoE block."""

    @property
    def needs(self) -> Needs:
        """What has to be there when it is called."""

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Shrinks a block; the targets (experts, width, rank) are the method's fields."""


def second_moment(inputs_nN: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over the inputs: float64 [N, N], zeros if there are none."""
    total_NN = torch.zeros(2 * inputs_nN.shape[1:], dtype=torch.float64)
    for part_nN in inputs_nN.split(_TOKENS_AT_ONCE):
        part_nN = part_nN.double()
        total_NN += part_nN.T @ part_nN
    return total_NN


_TOKENS_AT_ONCE = 4096  # widened to float64

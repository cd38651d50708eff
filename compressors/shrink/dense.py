"""A dense student: each layer's experts condensed into one feed-forward, which every token goes through.

It is a MoE block of one expert: a softmax over one logit gives gate 1 whatever the router says. So student, streaming,
statistics and training need to know nothing about it, and only files differ: they hold a plain feed-forward, in the
architecture of the family's dense counterpart (:attr:`compressors.model.description.spec.ModelSpec.written`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from compressors.model.description.routing import Score
from compressors.model.description.spec import LayerSpec, ModelSpec, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.model.families.registry import supported_families
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from compressors.shrink.prune import highest

__all__ = ["Condense", "check_dense", "dense_size"]


@dataclass(frozen=True)
class Condense:
    """Puts the neurons of the layer's top-k experts with the highest REAP scores side by side in one expert.

    A token's K gated experts become the same K for every token, together as wide as before: gate and up projections
    are stacked, down projections stand side by side, each times the expert's mean gate over the tokens that chose it,
    which is the expected gate (0 for an expert that no token chose). Of equal scores the lower index
    wins. "Every Expert Matters" (arXiv 2502.12947), whose methods teach such a student, takes a pretrained dense model
    instead and gives no initialisation.
    """

    needs: ClassVar[Needs] = Needs.WEIGHTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with the one wide expert, which stands for the experts whose neurons it has."""
        statistics = evidence.statistics
        chosen = highest(statistics.reap_scores(), block.top_k)
        mean_gate_E = (statistics.gate_sum_E / statistics.count_E.clamp_min(1)).float()
        of_inputs = zip(*(block.input_matrices(expert) for expert in chosen), strict=True)
        gate_up_FD = torch.cat([matrix_FD for matrices in of_inputs for matrix_FD in matrices])
        down_DF = torch.cat([mean_gate_E[expert] * block.down(expert) for expert in chosen], dim=1)
        condensed = replace(block.keep(chosen[:1]), gate_up_EFD=gate_up_FD[None], down_EDF=down_DF[None])
        if block.gate_up_bias_EF is not None:
            gates_EF, ups_EF = block.gate_up_bias_EF[list(chosen)].chunk(2, dim=-1)
            condensed = replace(condensed, gate_up_bias_EF=torch.cat([gates_EF.flatten(), ups_EF.flatten()])[None])
        if block.down_bias_ED is not None:
            bias_D = mean_gate_E[list(chosen)] @ block.down_bias_ED[list(chosen)]
            condensed = replace(condensed, down_bias_ED=bias_D[None])
        return CompressedBlock(condensed, (chosen,), changed_experts=frozenset({0}))


def dense_size(teacher: ModelSpec) -> MoeSize:
    """The size of each layer's one expert: as wide as all experts that a token used."""
    return MoeSize(1, teacher.top_k * teacher.expert_width)


def check_dense(teacher: ModelSpec) -> None:
    """Refuses a teacher that no dense architecture matches, or whose experts cannot become one feed-forward.

    Raises:
        UnsupportedError: its family has no dense counterpart (the message lists the families with one), or a layer has
            a part without a definition in a dense student.
    """
    for index, layer in enumerate(teacher.layers):
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise UnsupportedError(
                f"--student dense: layer {index} {obstacle}, for which a dense student has no definition; leave "
                "--student dense out, and give --method or --experts to make experts fewer"
            )
    if teacher.family.dense is None:
        possible = ", ".join(sorted(name for name, family in supported_families().items() if family.dense is not None))
        raise UnsupportedError(
            f"--student dense: no dense architecture matches {teacher.model_type} in everything but the experts; "
            f"there is one for {possible}"
        )


def _obstacle(layer: LayerSpec) -> str | None:
    """The part of a layer that one feed-forward, with weight 1 for every token, cannot replace; None: there is none.

    One expert has weight 1 where the weights come from a softmax.
    """
    routed = layer.routed
    if routed is None:
        return "has no routed experts"
    if routed.shared is not None:
        return "has a shared expert"
    if routed.routing.score is Score.SIGMOID:
        return "has a router whose scores are sigmoids"
    if routed.routing.n_groups > 1:
        return "has a router that chooses groups of experts first"
    return "multiplies the weights of experts by a constant" if routed.routing.scale != 1.0 else None

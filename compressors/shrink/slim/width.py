"""Makes experts narrower: the neurons that add most to the output stay, and the down projection makes up for the rest.

Letters as in :mod:`compressors.shrink.moe_block`; M neurons that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from compressors.model.sources.narrowed import correction_is_smaller, narrowed_down
from compressors.shrink.moe_block import CompressedBlock, Evidence, KeptNeurons, MoeBlock, Needs, second_moment
from compressors.shrink.prune import highest
from compressors.shrink.slim.possible_widths import check_width

__all__ = ["SlimWidth", "compensation", "neuron_importance"]

_PRIOR_TOKENS = 100
"""The plain slice weighs as much as this many tokens of average activations. On two layers of both trained fixtures, at
50 and 75 % of the width, with 8 to 768 tokens per expert, no other ridge (0.3 to 100 tokens, 0.0001 to 0.1 of the mean
diagonal) had an error on other tokens that was more than 2 % lower."""


@dataclass(frozen=True)
class SlimWidth:
    """Structured width pruning inside each expert, with least-squares compensation.

    Each expert keeps its ``width`` neurons of highest :func:`neuron_importance`, in ascending order, with their gate
    and up rows as they were; the columns of its down projection get those of the cut neurons by :func:`compensation`.
    Both look at the sample tokens that chose the expert. At full width the block is returned as it is.
    """

    width: int
    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with every expert ``width`` neurons wide; down projections are float32.

        Raises:
            InputError: ``width`` is not from 1 to the block's width.
        """
        check_width(self.width, block.width)
        if self.width == block.width:
            return CompressedBlock.unchanged(block)
        routes = block.route(evidence.router_sample_TD)
        gate_up, biases, down, narrowed = [], [], [], {}
        for expert in range(block.n_experts):
            hidden_nF = block.hidden(expert, evidence.sample_TD[routes.of_expert(expert)[0]])
            moment_FF = second_moment(hidden_nF)
            kept = highest(neuron_importance(block, expert, moment_FF.diagonal()), self.width)
            rows = [matrix * block.width + neuron for matrix in range(block.n_inputs) for neuron in kept]
            gate_up.append(block.gate_up_EFD[expert, rows])
            if block.gate_up_bias_EF is not None:
                biases.append(block.gate_up_bias_EF[expert, rows])
            ridge = _PRIOR_TOKENS * float(moment_FF.diagonal().mean()) / max(len(hidden_nF), 1)
            correction_RM = compensation(moment_FF, kept, ridge)
            down.append(narrowed_down(block.down(expert), kept, correction_RM))
            narrowed[expert] = self._kept(block, kept, correction_RM)
        narrower = replace(block, gate_up_bias_EF=torch.stack(biases) if biases else None)
        rewritten = CompressedBlock.rewritten(narrower, torch.stack(gate_up), torch.stack(down))
        return replace(rewritten, narrowed=narrowed)

    def _kept(self, block: MoeBlock, kept: tuple[int, ...], correction_RM: torch.Tensor | None) -> KeptNeurons:
        if correction_RM is None or correction_is_smaller(
            block.size, len(correction_RM), block.down_EDF.element_size()
        ):
            return KeptNeurons(kept, correction_RM)
        return KeptNeurons(kept, None, has_own_down=True)


def neuron_importance(block: MoeBlock, expert: int, hidden_square_F: torch.Tensor) -> torch.Tensor:
    """Norm of what each neuron adds to the expert's output, ||down[:, f]|| * ||h_f||: float64 [F].

    ``hidden_square_F`` are the sums of h_f^2 over the expert's tokens. It is the root of the sum of squares of Wanda's
    scores |W| * ||X|| (arXiv 2306.11695) over the neuron's column; FLAP (arXiv 2312.11983) calls such a structured
    form Wanda-sp. An expert without tokens is judged by its weights: ||gate_f|| * ||up_f|| * ||down[:, f]||, without
    the gate's norm where there is no gate.
    """
    down_norms_F: torch.Tensor = block.down(expert).double().norm(dim=0)
    if hidden_square_F.any():
        return down_norms_F * hidden_square_F.sqrt()
    norms_F = torch.ones_like(down_norms_F)
    for matrix_FD in block.input_matrices(expert):
        norms_F = norms_F * matrix_FD.double().norm(dim=1)
    return norms_F * down_norms_F


def compensation(moment_FF: torch.Tensor, kept: tuple[int, ...], ridge: float) -> torch.Tensor | None:
    """The factors of the cut columns with which the narrower down projection comes closest to the full one's output.

    Minimises sum ||W h - W' h_M||^2 + ridge ||W' - W_M||^2 over the tokens behind the second moment S = sum h h^T:
    W' = W_M + W_R S_RM (S_MM + ridge I)^-1, with the dropped neurons R. Least squares after channel pruning are those
    of He et al. (arXiv 1707.06168). The ridge pulls towards the plain slice, not towards zero: the fewer tokens an
    expert has, the less its columns change, and without tokens they stay as they are.

    Returns:
        S_RM (S_MM + ridge I)^-1, float32 [R, M]; None without tokens.
    """
    if not moment_FF.any():
        return None
    is_kept_F = torch.zeros(len(moment_FF), dtype=torch.bool)
    is_kept_F[list(kept)] = True
    system_MM = moment_FF[is_kept_F][:, is_kept_F]
    system_MM.diagonal().add_(ridge)
    factors_RM: torch.Tensor = torch.linalg.solve(system_MM, moment_FF[~is_kept_F][:, is_kept_F], left=False)
    return factors_RM.float()

"""Shows the cost of collapsing the router: the block as M-SMoE and HC-SMoE publish it, with all router rows kept."""

from __future__ import annotations

import torch

from compressors.shrink.moe_block import CompressedBlock, MoeBlock

__all__ = ["forward_with_aliases"]


def forward_with_aliases(original: MoeBlock, compressed: CompressedBlock, inputs_TD: torch.Tensor) -> torch.Tensor:
    """The block's output when every router row of the original stays, as an alias of its group's merged expert.

    A token that chose several members of a group gets the merged expert once, with the sum of their gates. This is a
    comparison arm in torch alone: containers and checkpoints have one router row for each expert.

    Args:
        original: the block that was merged, for its router.
        compressed: the result of a merging method.
        inputs_TD: states that enter the block.

    Returns:
        float32 [T, D].
    """
    routes = original.route(inputs_TD)
    gates_TE = torch.zeros_like(routes.logits_TE).scatter_(1, routes.chosen_TK, routes.gates_TK)
    chosen_TE = torch.zeros_like(routes.logits_TE, dtype=torch.bool).scatter_(1, routes.chosen_TK, True)
    output_TD = torch.zeros(inputs_TD.shape, dtype=torch.float32)
    for index, group in enumerate(compressed.groups):
        members = list(group)
        tokens = chosen_TE[:, members].any(-1).nonzero().squeeze(1)
        gates_n = gates_TE[tokens][:, members].sum(-1)
        output_TD.index_add_(0, tokens, gates_n[:, None] * compressed.block.output(index, inputs_TD[tokens]))
    return output_TD

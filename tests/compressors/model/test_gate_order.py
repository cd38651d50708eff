"""The two orders of gates and ups: each by hand, and each undoes the other."""

from __future__ import annotations

import torch

from compressors.model.description.gate_order import gates_first, in_turn
from compressors.model.description.tensors import Fused


def test_the_orders() -> None:
    alternating = torch.tensor([[1, 10, 2, 20, 3, 30], [4, 40, 5, 50, 6, 60]])
    apart = torch.tensor([[1, 2, 3, 10, 20, 30], [4, 5, 6, 40, 50, 60]])
    assert torch.equal(gates_first(alternating), apart)
    assert torch.equal(in_turn(apart), alternating)


def test_matrices_of_every_layout() -> None:
    """Two parts of three rows and two columns."""
    matrix = torch.arange(6).view(3, 2)
    other = matrix + 10
    in_turn_rows = torch.stack([matrix, other], dim=1).flatten(0, 1)
    for is_interleaved, rows in ((False, torch.cat([matrix, other])), (True, in_turn_rows)):
        for is_transposed, stored in ((False, rows), (True, rows.T)):
            for part, wanted in enumerate((matrix, other)):
                fused = Fused("x", part, 2, is_interleaved=is_interleaved, is_transposed=is_transposed)
                assert fused.of_expert(3, 2) == tuple(stored.shape)
                assert torch.equal(fused.matrix(stored), wanted)

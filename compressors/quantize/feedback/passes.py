"""Chooses the codes of a whole matrix under the second moments of its inputs, one group of columns after the other.

Everything is stored with columns first, [N, R]: a column of all rows lies together, and rows are independent.
The elementary steps are numpy's, which has the smaller overhead on single columns; products of matrices are torch's,
which obey the caller's number of threads.

Letters: N columns in the order of the couplings, R rows, B columns of a block, L columns of a group.
"""

from __future__ import annotations

from typing import Protocol

import torch

from compressors.quantize.feedback.moments import Couplings, Feedback

__all__ = ["SLICE_ROWS", "Grid", "choose_codes", "improve_codes", "n_sweeps_for", "ordered_columns"]

SLICE_ROWS = 1024
"""Rows that are rounded together: a column of them fits a core's first cache."""

_BLOCK = 32  # columns whose targets one product of matrices updates


class Grid(Protocol):
    """The values that a format can represent, group by group, and the codes chosen so far."""

    length: int  # columns of a group

    def round_group(
        self, group: int, targets_LR: torch.Tensor, metric_LL: torch.Tensor, current_LR: torch.Tensor | None
    ) -> torch.Tensor:
        """Chooses the codes of one group of columns, and returns their values, [L, R].

        ``group`` counts in the order of the couplings. A choice of values near ``targets_LR`` by ``metric_LL`` is never
        worse than ``current_LR``, if given.
        """


def choose_codes(values_NR: torch.Tensor, grid: Grid, feedback: Feedback, n_sweeps: int) -> torch.Tensor:
    """Rounds ``values_NR`` (float32, columns in the order of the feedback) on the grid, and returns the errors w - q.

    One pass of error feedback chooses all codes; each of ``n_sweeps`` passes of coordinate descent improves on them.
    """
    errors_NR = torch.zeros_like(values_NR)
    _one_pass(values_NR, errors_NR, grid, feedback.propagation(grid.length))
    improve_codes(values_NR, errors_NR, grid, feedback, n_sweeps)
    return errors_NR


def ordered_columns(values_RN: torch.Tensor, order_N: torch.Tensor) -> torch.Tensor:
    """The values as float32 [N, R], columns in the order in which they are rounded."""
    return values_RN.float().T[order_N].contiguous()


def n_sweeps_for(bits: int) -> int:
    """Returns the passes of coordinate descent for codes of ``bits`` bits.

    They remove 10 to 25 % of the error at 2 bits and 3 to 5 % at 4 and 5. At 6 and more, the remaining error is far
    below that of the runtimes' own rounding.
    """
    return {1: 3, 2: 3, 3: 2, 4: 1, 5: 1}.get(bits, 0)


def improve_codes(
    values_NR: torch.Tensor, errors_NR: torch.Tensor, grid: Grid, feedback: Feedback, n_sweeps: int
) -> None:
    """Chooses the grid's codes again, given all others, ``n_sweeps`` times, and updates ``errors_NR``."""
    for _ in range(n_sweeps):
        _one_pass(values_NR, errors_NR, grid, feedback.descent(grid.length))


def _one_pass(values_NR: torch.Tensor, errors_NR: torch.Tensor, grid: Grid, couplings: Couplings) -> None:
    """Moves every group to the nearest values on the grid, given the errors of the groups before it (and after it)."""
    for first in range(0, len(values_NR), _BLOCK):
        block = slice(first, min(first + _BLOCK, len(values_NR)))
        sources = slice(0, first) if couplings.only_earlier else slice(None)
        targets_BR = torch.addmm(values_NR[block], couplings.weights_NN[block, sources], errors_NR[sources])
        _one_block(values_NR[block], errors_NR[block], targets_BR, grid, couplings, block)


def _one_block(
    values_BR: torch.Tensor,
    errors_BR: torch.Tensor,
    targets_BR: torch.Tensor,
    grid: Grid,
    couplings: Couplings,
    block: slice,
) -> None:
    """Rounds the groups of one block; ``targets_BR`` include every error as it was when the block began."""
    weights_BB = couplings.weights_NN[block, block]
    changes_BR = errors_BR.clone()  # holds the errors before, and becomes the changes from the front
    for start in range(0, len(values_BR), grid.length):
        group = slice(start, start + grid.length)
        if start > 0:
            targets_BR[group].addmm_(weights_BB[group, :start], changes_BR[:start])
        current_LR = None if couplings.only_earlier else values_BR[group] - errors_BR[group]
        at = (block.start + start) // grid.length
        rounded_LR = grid.round_group(at, targets_BR[group], couplings.metric_GLL[at], current_LR)
        torch.sub(values_BR[group], rounded_LR, out=errors_BR[group])
        torch.sub(errors_BR[group], changes_BR[group], out=changes_BR[group])

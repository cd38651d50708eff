"""Checks that the embedding and the head are finite, because no text reaches all of their rows."""

from __future__ import annotations

import torch

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.source import Source

__all__ = ["check_vocabulary_is_finite"]

_VALUES_AT_ONCE = 1 << 22


def check_vocabulary_is_finite(source: Source) -> None:
    """Reads all rows of the embedding and the head, a few at a time.

    Raises:
        InputError: a value is NaN or infinite; the message names the tensor and the row.
    """
    spec = source.spec
    n_rows = max(1, _VALUES_AT_ONCE // spec.hidden_size)
    for role in (Role.TOKEN_EMBEDDING, *(() if spec.tied_embeddings else (Role.HEAD,))):
        for start in range(0, spec.vocab_size, n_rows):
            rows_RD = source.rows(role, None, slice(start, start + n_rows))
            # a sum shows NaN and infinity without a temporary; a sum that overflows is looked at again
            if torch.isfinite(rows_RD.sum(dtype=torch.float32)):
                continue
            wrong = (~torch.isfinite(rows_RD)).any(dim=1).nonzero()
            if len(wrong):
                raise InputError(
                    f"{source.path}: tensor {spec.tensor(role).name} holds NaN or infinite values, first in "
                    f"row {start + int(wrong[0])} of {spec.vocab_size}; download the weights again"
                )

"""Full-vocabulary log-probabilities in 16 bits, on disk: what selection and held-out tokens are judged against.

The coding is llama.cpp's (``tools/perplexity/perplexity.cpp``): for each position 65,536 even steps between the
largest log-probability and 16 nats below it (or the smallest, if that is nearer), so a step is at most 2.4e-4 nats.
Tokens further down get code 0 and count as impossible; each has less than 1.2e-7 of the largest probability.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from compressors.model.array_file import ArrayFile
from compressors.model.errors import InputError

__all__ = ["LogProbReader", "LogProbWriter", "log_prob_bytes"]

_RANGE_NATS = 16.0
_STEPS = 65535
_VALUES_AT_ONCE = 1 << 23  # log-probabilities that are coded together: 32 MB in float32, a few times over


def log_prob_bytes(n_positions: int, vocab_size: int) -> int:
    """Bytes on disk of the coded log-probabilities, without the few bytes of the arrays' headers."""
    return n_positions * (2 * vocab_size + 8)


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "codes.npy", folder / "scale_and_minimum.npy"


class LogProbWriter:
    """Writes coded log-probabilities into ``folder``, which is made, for ``n_positions`` of ``vocab_size`` each.

    With ``join`` the files are another process's of this run, which made them; each writes its own positions.
    """

    def __init__(self, folder: Path, n_positions: int, vocab_size: int, *, join: bool = False) -> None:
        codes, ranges = _paths(folder)
        if join:
            self._codes, self._ranges = (ArrayFile.open(path, writable=True) for path in (codes, ranges))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._codes = ArrayFile.create(codes, (n_positions, vocab_size), np.uint16)
            self._ranges = ArrayFile.create(ranges, (n_positions, 2), np.float32)

    def write(self, start: int, logits_NV: torch.Tensor) -> None:
        """Codes the log-softmax of these logits for N positions from ``start`` on."""
        for logits in logits_NV.split(max(1, _VALUES_AT_ONCE // logits_NV.shape[-1])):
            log_probs = torch.log_softmax(logits.float(), dim=-1)
            largest = log_probs.amax(-1, keepdim=True)
            smallest = torch.maximum(log_probs.amin(-1, keepdim=True), largest - _RANGE_NATS)
            scale = (largest - smallest) / _STEPS
            codes = log_probs.sub_(smallest).div_(scale.clamp_min(1e-30)).round_().clamp_(0, _STEPS)
            self._codes.write(start, codes.numpy().astype(np.uint16))
            self._ranges.write(start, torch.cat([scale, smallest], dim=-1).numpy())
            start += len(logits)


class LogProbReader:
    """Reads what :class:`LogProbWriter` wrote, a few positions at a time."""

    def __init__(self, folder: Path) -> None:
        codes, ranges = _paths(folder)
        try:
            self._codes = ArrayFile.open(codes)
            self._ranges = ArrayFile.open(ranges)
        except InputError as error:
            raise InputError(f"the teacher's log-probabilities in {folder} cannot be read ({error})") from None

    def __len__(self) -> int:
        return len(self._codes)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V], -inf for impossible tokens."""
        codes = torch.from_numpy(self._codes.read(start, stop).astype(np.float32))
        ranges = torch.from_numpy(self._ranges.read(start, stop))
        scale, smallest = ranges[:, :1], ranges[:, 1:]
        impossible = (codes == 0) & (scale * _STEPS >= _RANGE_NATS * (1 - 1e-6))
        return codes.mul_(scale).add_(smallest).masked_fill_(impossible, -torch.inf)

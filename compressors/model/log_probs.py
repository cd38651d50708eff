"""Full-vocabulary log-probabilities in 16 bits, on disk: what selection and held-out tokens are judged against.

The coding is llama.cpp's (``tools/perplexity/perplexity.cpp``): for each position 65,536 even steps between the
largest log-probability and 16 nats below it (or the smallest, if that is nearer), so a step is at most 2.4e-4 nats.
Tokens further down get code 0 and count as impossible; each has less than 1.2e-7 of the largest probability.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from compressors.model.errors import InputError

__all__ = ["LogProbReader", "LogProbWriter", "log_prob_bytes"]

_RANGE_NATS = 16.0
_STEPS = 65535


def log_prob_bytes(n_positions: int, vocab_size: int) -> int:
    """Bytes on disk of the coded log-probabilities, without the few bytes of the arrays' headers."""
    return n_positions * (2 * vocab_size + 8)


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "codes.npy", folder / "scale_and_minimum.npy"


class LogProbWriter:
    """Writes coded log-probabilities position by position into a new folder."""

    def __init__(self, folder: Path, n_positions: int, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        codes, ranges = _paths(folder)
        self._codes = np.lib.format.open_memmap(codes, "w+", np.uint16, (n_positions, vocab_size))
        self._ranges = np.lib.format.open_memmap(ranges, "w+", np.float32, (n_positions, 2))
        self._next = 0

    def append(self, logits_NV: torch.Tensor) -> None:
        """Codes the log-softmax of these logits for the next N positions."""
        log_probs = torch.log_softmax(logits_NV.float(), dim=-1)
        largest = log_probs.amax(-1, keepdim=True)
        smallest = torch.maximum(log_probs.amin(-1, keepdim=True), largest - _RANGE_NATS)
        scale = (largest - smallest) / _STEPS
        codes = ((log_probs - smallest) / scale.clamp_min(1e-30)).round().clamp(0, _STEPS)
        rows = slice(self._next, self._next + len(logits_NV))
        self._codes[rows] = codes.to(torch.int32).numpy().astype(np.uint16)
        self._ranges[rows] = torch.cat([scale, smallest], dim=-1).numpy()
        self._next = rows.stop

    def close(self) -> None:
        """Flushes to disk; every position must have been written."""
        assert self._next == len(self._codes), f"{self._next} of {len(self._codes)} positions written"
        self._codes.flush()
        self._ranges.flush()


class LogProbReader:
    """Reads what :class:`LogProbWriter` wrote, a few positions at a time."""

    def __init__(self, folder: Path) -> None:
        codes, ranges = _paths(folder)
        try:
            self._codes = np.load(codes, mmap_mode="r", allow_pickle=False)
            self._ranges = np.load(ranges, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"the teacher's log-probabilities in {folder} cannot be read ({error})") from None

    def __len__(self) -> int:
        return len(self._codes)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V], -inf for impossible tokens."""
        codes = torch.from_numpy(np.asarray(self._codes[start:stop]).astype(np.int32))
        ranges = torch.from_numpy(self._ranges[start:stop])
        scale, smallest = ranges[:, :1], ranges[:, 1:]
        log_probs = codes.float() * scale + smallest
        impossible = (codes == 0) & (scale * _STEPS >= _RANGE_NATS * (1 - 1e-6))
        return log_probs.masked_fill(impossible, -torch.inf)

"""Full-vocabulary log-probabilities in 16 bits, on disk: selection and held-out tokens are judged against them.

The coding is llama.cpp's (``tools/perplexity/perplexity.cpp``): for each position 65,536 even steps between the
largest log-probability and 16 nats below it (or the smallest, if that is nearer), so a step is at most 2.4e-4 nats.
Tokens further down get code 0 and count as impossible; each has less than 1.2e-7 of the largest probability.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from compressors.model.errors import InputError
from compressors.model.files.array_file import ArrayFile

if TYPE_CHECKING:
    import torch

__all__ = [
    "KnownLogProbs",
    "LogProbReader",
    "LogProbSink",
    "LogProbWriter",
    "decode_log_probs",
    "encode_log_probs",
    "log_sum_exp",
    "without_impossible",
]

_RANGE_NATS = 16.0
_STEPS = 65535
_VALUES_AT_ONCE = 1 << 23  # log-probabilities that are coded together: 32 MB in float32, a few times over


def log_sum_exp(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit and log sum exp(logit - largest), rounded as llama-perplexity rounds: float32 [N, 1] both.

    Its ``expf`` is almost correctly rounded (0.502 ulp in glibc), and it sums in double precision. torch's own
    float32 exp is not that exact; the double precision one, rounded, is.
    """
    import torch

    largest = logits_NV.amax(-1, keepdim=True)
    powers = (logits_NV - largest).double().exp_().float()
    return largest, powers.sum(-1, keepdim=True, dtype=torch.float64).log_().float()


def encode_log_probs(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-softmax in 16 bits, bit for bit as llama-perplexity writes it.

    Args:
        logits_NV: float32.

    Returns:
        Codes, float32 [N, V] with whole numbers from 0 to 65,535, and (scale, smallest), float32 [N, 2]: a token's
        log-probability is code * scale + smallest.
    """
    import torch

    largest, log_sum = log_sum_exp(logits_NV)
    smallest = torch.maximum(logits_NV.amin(-1, keepdim=True), largest - _RANGE_NATS)
    scale = (largest - smallest) / _STEPS
    inverse = scale.reciprocal().masked_fill_(scale == 0, 0.0)  # all logits equal: all codes 0
    codes = (logits_NV - smallest).mul_(inverse).round_().clamp_min_(0.0)
    return codes, torch.cat([scale, smallest - largest - log_sum], dim=-1)


def decode_log_probs(codes_NV: torch.Tensor, scale_and_smallest_N2: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`encode_log_probs`, in place; tokens out of range get the smallest log-probability."""
    return codes_NV.mul_(scale_and_smallest_N2[:, :1]).add_(scale_and_smallest_N2[:, 1:])


def without_impossible(codes_NV: torch.Tensor, scale_and_smallest_N2: torch.Tensor) -> torch.Tensor:
    """As :func:`decode_log_probs`, also in place, but tokens out of range get -inf."""
    import torch

    impossible = (codes_NV == 0) & (scale_and_smallest_N2[:, :1] * _STEPS >= _RANGE_NATS * (1 - 1e-6))
    return decode_log_probs(codes_NV, scale_and_smallest_N2).masked_fill_(impossible, -torch.inf)


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "codes.npy", folder / "scale_and_minimum.npy"


class KnownLogProbs(Protocol):
    """A model's log-probabilities at all scored positions, whether they were kept or are made again."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V], -inf for impossible tokens."""


class LogProbSink(Protocol):
    """An object that takes the logits of positions and keeps their log-probabilities."""

    def write(self, start: int, logits_NV: torch.Tensor) -> None:
        """Keeps N positions from ``start`` on."""


class LogProbWriter:
    """Writes coded log-probabilities into ``folder``, which is created, for ``n_positions`` of ``vocab_size`` each.

    With ``join``, another process of this run has created the files; each process writes its own positions.
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
            codes, ranges = encode_log_probs(logits.float())
            self._codes.write(start, codes.numpy().astype(np.uint16))
            self._ranges.write(start, ranges.numpy())
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
        return without_impossible(*self._read(start, stop))

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """The log-probabilities; impossible tokens have the smallest one, as llama-perplexity reads its file."""
        return decode_log_probs(*self._read(start, stop))

    def _read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        codes = torch.from_numpy(self._codes.read(start, stop).astype(np.float32))
        return codes, torch.from_numpy(self._ranges.read(start, stop))

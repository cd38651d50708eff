"""Predictions that are kept as the inputs of the head; log-probabilities are made again when they are compared.

An input is as long as the hidden size: at a vocabulary of 151,936 it takes 8 KB a position in float32, where the
log-probabilities in 16 bits (:mod:`compressors.model.predictions.log_probs`) take 300 KB. They are made and rounded in
the same way, so whoever compares sees what the longer file would hold.

Letters: N positions, D the hidden size, V the vocabulary, n positions that are made together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.array_file import ArrayFile
from compressors.model.predictions.log_probs import decode_log_probs, encode_log_probs, without_impossible
from compressors.model.sources.student import Student

__all__ = ["HeadInputs", "RemadeLogProbs", "finished_logits", "head_parts"]

_VALUES_AT_ONCE = 1 << 23  # log-probabilities that are made together: 32 MB in float32, a few times over
_HEAD_ROWS_AT_ONCE = 8192


def finished_logits(products_NV: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """The logits of the products of head and inputs: divided by the model's divisor, then capped."""
    divisor, cap = spec.logit_divisor, spec.logit_cap
    logits_NV = products_NV if divisor == 1.0 else products_NV / divisor
    return logits_NV if cap is None else (logits_NV / cap).tanh() * cap


def head_parts(n_rows: int) -> list[slice]:
    """The head's rows in parts, so that few of them are in memory twice while their dtype changes."""
    return [slice(start, min(start + _HEAD_ROWS_AT_ONCE, n_rows)) for start in range(0, n_rows, _HEAD_ROWS_AT_ONCE)]


class HeadInputs:
    """The inputs of the head, after the last norm, at the scored positions of all token blocks: float32 [N, D].

    Raises:
        InputError: the file is missing, damaged or cut off.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        try:
            self._file = ArrayFile.open(path, writable=writable)
        except InputError as error:
            raise InputError(f"the predictions in {path} cannot be read ({error})") from None

    @classmethod
    def create(cls, path: Path, n_positions: int, hidden_size: int) -> HeadInputs:
        """Makes a file for all positions, and the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        ArrayFile.create(path, (n_positions, hidden_size), np.float32)
        return cls(path, writable=True)

    def __len__(self) -> int:
        return len(self._file)

    @property
    def hidden_size(self) -> int:
        """The length of an input."""
        return self._file.shape[1]

    def write(self, start: int, inputs_nD: torch.Tensor) -> None:
        """Writes the inputs of positions from ``start`` on."""
        self._file.write(start, inputs_nD.float().numpy())

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the inputs of positions start..stop: float32 [stop - start, D]."""
        return torch.from_numpy(self._file.read(start, stop))


class RemadeLogProbs:
    """Log-probabilities of a model, made of the inputs of its head a few positions at a time, in float32.

    Positions are made in groups that their number and the vocabulary decide, whoever asks for which: the same position
    always gets the same bits. The head stays in memory in storage dtype, and its parts are widened one after another.

    Args:
        inputs: the inputs at all positions.
        model: the model that they are of: its head is read.
        device: the device that multiplies.

    Raises:
        InputError: the inputs are of a model of another width.
    """

    def __init__(self, inputs: HeadInputs, model: Student, device: torch.device | None = None) -> None:
        if inputs.hidden_size != model.spec.hidden_size:
            raise InputError(
                f"the predictions are of a model of {inputs.hidden_size} values a token, and {model.source.path} has "
                f"{model.spec.hidden_size}: gather them again"
            )
        self._inputs = inputs
        self._spec = model.spec
        self._device = device or torch.device("cpu")
        self._head = [model.rows(Role.HEAD, None, rows).to(self._device) for rows in head_parts(model.spec.vocab_size)]
        self._per_group = max(1, _VALUES_AT_ONCE // model.spec.vocab_size)
        self._group: tuple[int, torch.Tensor, torch.Tensor] | None = None  # its number, codes, and ranges

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that have a log-probability."""
        return self._spec.vocab_size

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V], -inf for impossible tokens."""
        codes, ranges = self._coded(start, stop)
        return without_impossible(codes, ranges)

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """The log-probabilities; impossible tokens have the smallest one, as llama-perplexity reads its file."""
        return decode_log_probs(*self._coded(start, stop))

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> torch.Tensor:
        """Logits of positions start..stop, which are multiplied together: float32 [stop - start, V]."""
        inputs_nD = self._inputs.read(start, stop).to(self._device)
        products = [functional.linear(inputs_nD, part_rD.float()) for part_rD in self._head]
        return finished_logits(torch.cat(products, dim=-1), self._spec).cpu()

    def _coded(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and ranges of these positions, as :func:`encode_log_probs` gives them, in memory of their own."""
        parts = []
        for number in range(start // self._per_group, -(-stop // self._per_group)):
            first = number * self._per_group
            codes, ranges = self._coded_group(number)
            rows = slice(max(0, start - first), stop - first)
            parts.append((codes[rows], ranges[rows]))
        return torch.cat([codes for codes, _ in parts]), torch.cat([ranges for _, ranges in parts])

    def _coded_group(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._group is None or self._group[0] != number:
            self._group = None  # its memory is needed
            first = number * self._per_group
            logits_nV = self.logits(first, min(first + self._per_group, len(self)))
            self._group = (number, *encode_log_probs(logits_nV))
        return self._group[1:]

"""llama.cpp's logits file, which ``llama-perplexity --kl-divergence-base FILE`` writes and ``--kl-divergence`` reads.

Little-endian: the magic ``_logits_``; the chunk length, the vocabulary size and the number of chunks as int32; all
tokens as int32; then, for the scored positions chunk after chunk, float32 scale, float32 smallest log-probability and
a 16-bit code for each token (one more, unused, if their number is odd). Source: ``perplexity`` and ``kl_divergence`` in
``tools/perplexity/perplexity.cpp``. If a model needs BOS, the tool replaces each chunk's first token by it when it
evaluates; the file keeps the text's own token there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.model.files.array_file import ArrayFile
from compressors.model.files.raw_file import RawFile
from compressors.model.predictions.log_probs import decode_log_probs, encode_log_probs
from validate.runtimes.backend import scored_positions

__all__ = ["LogitsFile", "LogitsFileWriter"]

_MAGIC = b"_logits_"
_NUMBER = np.dtype("<i4")
_CODE = np.dtype("<u2")
_HEAD = len(_MAGIC) + 3 * 4
_RANGE_CODES = 4  # two float32 take the place of this many codes


@dataclass(frozen=True)
class _Layout:
    """The sizes and offsets of a file's parts."""

    n_tokens: int  # the length of a chunk
    vocab_size: int
    n_chunks: int

    @property
    def n_positions(self) -> int:
        scored = scored_positions(self.n_tokens)
        per_chunk: int = scored.stop - scored.start
        return self.n_chunks * per_chunk

    @property
    def codes_per_position(self) -> int:
        return _RANGE_CODES + self.vocab_size + self.vocab_size % 2

    @property
    def positions_start(self) -> int:
        return _HEAD + self.n_chunks * self.n_tokens * 4

    @property
    def n_bytes(self) -> int:
        return self.positions_start + self.n_positions * self.codes_per_position * 2

    def open(self, path: Path, flags: int) -> ArrayFile:
        """Opens the coded positions as rows."""
        return ArrayFile(path, (self.n_positions, self.codes_per_position), _CODE, self.positions_start, flags)


class LogitsFile:
    """Reads a file; implements :class:`validate.metrics.positions.ReferenceLogProbs`.

    Attributes:
        tokens_BT: int64, the chunks.
        vocab_size: the vocabulary size of the model that wrote it.

    Raises:
        InputError: the file is missing, something else, or cut off.
    """

    def __init__(self, path: Path) -> None:
        file = RawFile(path)
        layout = _read_layout(path, file.start(_HEAD))
        missing = layout.n_bytes - file.size
        if missing > 0:
            raise InputError(f"{path} was cut off: {missing:,} bytes are missing at its end; write it again")
        tokens = np.frombuffer(file.start(layout.n_chunks * layout.n_tokens * _NUMBER.itemsize, _HEAD), _NUMBER)
        self.tokens_BT: npt.NDArray[np.int64] = tokens.reshape(layout.n_chunks, layout.n_tokens).astype(np.int64)
        self.vocab_size = layout.vocab_size
        if self.tokens_BT.min() < 0 or self.tokens_BT.max() >= self.vocab_size:
            raise InputError(f"{path} is damaged: it has tokens that are not in its vocabulary of {self.vocab_size:,}")
        self._rows = layout.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._rows)

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V]."""
        rows = self._rows.read(start, stop)
        ranges = np.ascontiguousarray(rows[:, :_RANGE_CODES]).view("<f4")
        codes = rows[:, _RANGE_CODES : _RANGE_CODES + self.vocab_size].astype(np.float32)
        return decode_log_probs(torch.from_numpy(codes), torch.from_numpy(ranges))


class LogitsFileWriter:
    """Makes a file for these chunks; :meth:`write` fills it, in any order.

    Args:
        path: the file.
        tokens_BT: the chunks. Whether the first token of one is the text's or BOS does not matter: it is not scored.
        vocab_size: the vocabulary size of the model.

    Raises:
        InputError: the file cannot be written, or the disk is too small for it.
    """

    def __init__(self, path: Path, tokens_BT: npt.NDArray[np.int64], vocab_size: int) -> None:
        n_chunks, n_tokens = tokens_BT.shape
        layout = _Layout(n_tokens, vocab_size, n_chunks)
        try:
            free = shutil.disk_usage(path.parent).free
            if free < layout.n_bytes:
                raise InputError(f"{path} needs {layout.n_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
            with path.open("wb") as file:
                file.write(_MAGIC)
                file.write(np.array([n_tokens, vocab_size, n_chunks], _NUMBER).tobytes())
                file.write(tokens_BT.astype(_NUMBER).tobytes())
                file.truncate(layout.n_bytes)
            self._rows = layout.open(path, os.O_RDWR)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another place") from None
        self._vocab_size = vocab_size

    def write(self, start: int, logits_NV: torch.Tensor) -> None:
        """Codes the log-softmax of these logits, float32, for N positions from ``start`` on."""
        codes, ranges = encode_log_probs(logits_NV)
        rows = np.zeros((len(logits_NV), self._rows.shape[1]), _CODE)
        rows[:, :_RANGE_CODES] = ranges.numpy().astype("<f4").view(_CODE)
        rows[:, _RANGE_CODES : _RANGE_CODES + self._vocab_size] = codes.numpy()
        self._rows.write(start, rows)


def _read_layout(path: Path, head: bytes) -> _Layout:
    if not head.startswith(_MAGIC):
        raise InputError(
            f"{path} is not a logits file of llama.cpp; llama-perplexity --kl-divergence-base {path.name} writes one"
        )
    sizes = [int.from_bytes(head[place : place + 4], "little", signed=True) for place in range(len(_MAGIC), _HEAD, 4)]
    n_tokens, vocab_size, n_chunks = sizes
    if n_tokens < 3 or vocab_size < 1 or n_chunks < 1:
        raise InputError(f"{path} is damaged: its head gives no sizes; write it again")
    return _Layout(n_tokens, vocab_size, n_chunks)

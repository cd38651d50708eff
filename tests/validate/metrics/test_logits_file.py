"""llama.cpp's logits file and the figures from it, against the tool's C++ written out in numpy scalars."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.errors import InputError
from validate.metrics.logits_file import LogitsFile, LogitsFileWriter
from validate.metrics.positions import Scores
from validate.runtimes.backend import scored_positions

_F = np.float32
_CHUNKS, _TOKENS = 3, 12  # 5 scored positions a chunk

Logits = npt.NDArray[np.float32]


def _expf(value: np.float32) -> np.float32:
    return _F(np.exp(np.float64(value)))


def _log_sum_exp(logits: Logits) -> tuple[np.float32, np.float32]:
    largest = logits.max()
    total = 0.0
    for logit in logits:
        total += float(_expf(logit - largest))
    return largest, _F(np.log(total))


def _coded(logits: Logits) -> bytes:
    """``log_softmax(n_vocab, logits, log_prob, tok)`` of tools/perplexity/perplexity.cpp, and its padding."""
    largest, log_sum = _log_sum_exp(logits)
    smallest = max(logits.min(), largest - _F(16))
    scale = (largest - smallest) / _F(65535)
    codes = np.zeros(2 * ((len(logits) + 1) // 2), "<u2")
    if scale:
        inverse = _F(1) / scale
        for token, logit in enumerate(logits):
            if logit > smallest:
                magic = inverse * (logit - smallest) + _F(12582912)  # nearest_int
                codes[token] = (int(np.array(magic, _F).view(np.int32)) & 0x007FFFFF) - 0x00400000
    return struct.pack("<ff", scale, smallest - largest - log_sum) + codes.tobytes()


def _scores(logits: Logits, coded: bytes, token: int) -> tuple[float, float, float, bool]:
    """``log_softmax(n_vocab, logits, base_log_prob, tok, kld)``: the likelihoods, the divergence, the same top."""
    largest, log_sum = _log_sum_exp(logits)
    scale, smallest = (_F(value) for value in struct.unpack("<ff", coded[:8]))
    base = [scale * _F(code) + smallest for code in np.frombuffer(coded[8:], "<u2")[: len(logits)]]
    normalizer = largest + log_sum
    total = 0.0
    for log_prob, logit in zip(base, logits, strict=True):
        if log_prob > _F(-16):
            total += float(_expf(log_prob) * (log_prob - logit + normalizer))
    same = int(np.argmax(logits)) == base.index(max(base))
    return float(normalizer - logits[token]), float(-base[token]), total, same


@pytest.fixture(params=[57, 64], ids=["odd vocabulary", "even vocabulary"])
def case(request: pytest.FixtureRequest) -> tuple[npt.NDArray[np.int64], Logits]:
    """Tokens [B, T] and logits [N, V] with tails below 16 nats, a flat row and a row of two equal best tokens."""
    generator = np.random.default_rng(11)
    tokens_BT = generator.integers(0, request.param, (_CHUNKS, _TOKENS))
    logits_NV = generator.normal(0, 5, (_CHUNKS * 5, request.param)).astype(np.float32)
    logits_NV[3] = 1.5
    logits_NV[4, [7, 20]] = 30.0
    return tokens_BT, logits_NV


def _write(path: Path, tokens_BT: npt.NDArray[np.int64], logits_NV: Logits) -> LogitsFile:
    writer = LogitsFileWriter(path, tokens_BT, logits_NV.shape[1])
    for start in (4, 0):  # in any order
        stop = len(logits_NV) if start else 4
        writer.write(start, torch.from_numpy(logits_NV[start:stop]))
    return LogitsFile(path)


def test_every_byte_is_the_tool_s(case: tuple[npt.NDArray[np.int64], Logits], tmp_path: Path) -> None:
    tokens_BT, logits_NV = case
    _write(tmp_path / "base.kld", tokens_BT, logits_NV)
    expected = b"_logits_" + struct.pack("<iii", _TOKENS, logits_NV.shape[1], _CHUNKS)
    expected += tokens_BT.astype("<i4").tobytes() + b"".join(map(_coded, logits_NV))
    assert (tmp_path / "base.kld").read_bytes() == expected


def test_what_is_read_is_what_was_written(case: tuple[npt.NDArray[np.int64], Logits], tmp_path: Path) -> None:
    tokens_BT, logits_NV = case
    file = _write(tmp_path / "base.kld", tokens_BT, logits_NV)
    assert np.array_equal(file.tokens_BT, tokens_BT)
    assert (len(file), file.vocab_size) == logits_NV.shape
    log_probs = torch.from_numpy(logits_NV).double().log_softmax(-1)
    floor = log_probs.amax(-1, keepdim=True) - 16
    error = (file.decoded(0, len(file)).double() - torch.maximum(log_probs, floor)).abs()
    assert error.max() <= 16 / 65535 / 2 + 1e-5, "half a step"
    assert torch.equal(file.decoded(6, 9), file.decoded(0, len(file))[6:9])


def test_scores_are_the_tool_s(case: tuple[npt.NDArray[np.int64], Logits], tmp_path: Path) -> None:
    tokens_BT, logits_NV = case
    file = _write(tmp_path / "base.kld", tokens_BT, logits_NV)
    generator = np.random.default_rng(12)
    model_NV = (logits_NV + generator.normal(0, 0.4, logits_NV.shape)).astype(np.float32)
    scored = scored_positions(_TOKENS)
    targets = tokens_BT[:, scored.start + 1 : scored.stop + 1].ravel()
    expected = [_scores(m, _coded(r), t) for m, r, t in zip(model_NV, logits_NV, targets, strict=True)]
    reference_NV = file.decoded(0, len(file))
    scores = Scores(torch.from_numpy(model_NV), torch.from_numpy(targets))
    likelihood, base, kl, same = zip(*expected, strict=True)
    np.testing.assert_array_equal(scores.negative_log_likelihood(), np.array(likelihood, np.float32))
    np.testing.assert_array_equal(scores.reference_likelihood(reference_NV), np.array(base, np.float32))
    np.testing.assert_array_equal(scores.kl_divergence(reference_NV), np.array(kl, np.float32))
    np.testing.assert_array_equal(scores.same_top(reference_NV), same)
    assert 0 < sum(same) < len(same)
    assert min(kl) > 1e-3


def test_of_equally_probable_tokens_the_first_is_the_top(
    case: tuple[npt.NDArray[np.int64], Logits], tmp_path: Path
) -> None:
    tokens_BT, logits_NV = case
    reference_NV = _write(tmp_path / "base.kld", tokens_BT, logits_NV).decoded(4, 5)
    same = []
    for winner in (7, 20):
        model_NV = torch.zeros_like(reference_NV)
        model_NV[0, winner] = 1.0
        same.append(bool(Scores(model_NV, torch.tensor([0])).same_top(reference_NV)))
    assert same == [True, False]


def test_damaged_and_foreign_files_are_refused(case: tuple[npt.NDArray[np.int64], Logits], tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    with pytest.raises(InputError, match=r"base\.kld cannot be opened \(No such file"):
        LogitsFile(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"base\.kld is not a logits file of llama\.cpp; llama-perplexity"):
        LogitsFile(path)
    path.write_bytes(b"_logits_" + bytes(5))
    with pytest.raises(InputError, match=r"base\.kld is damaged: its head"):
        LogitsFile(path)
    _write(path, *case)
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(InputError, match=r"base\.kld was cut off: 10 bytes are missing"):
        LogitsFile(path)
    path.write_bytes(data[:20] + struct.pack("<i", 1 << 20) + data[24:])
    with pytest.raises(InputError, match=r"base\.kld is damaged: it has tokens that are not in its vocabulary"):
        LogitsFile(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tokens_BT = np.zeros((1, 12), np.int64)
    with pytest.raises(InputError, match=r"no-folder.* cannot be written"):
        LogitsFileWriter(tmp_path / "no-folder" / "x.kld", tokens_BT, 8)
    with pytest.raises(InputError, match=r"x\.kld needs [\d.]+ GB, and [\d.]+ GB are free there"):
        LogitsFileWriter(tmp_path / "x.kld", np.broadcast_to(tokens_BT, (1_000_000, 12)), 1_000_000)
    assert not (tmp_path / "x.kld").exists()


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.kld")
    with pytest.raises(InputError, match=r"base\.kld is a named pipe"):
        LogitsFile(tmp_path / "base.kld")

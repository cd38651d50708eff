"""Last words: the choice of words, and answers equal to those of greedy decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.calibration.splits import load_tokenizer
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from validate.metrics.cloze import LastWord, cloze_figures, find_last_words, load_last_words, save_last_words
from validate.metrics.evaluation import evaluate
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

_TEXT = (
    "The cat sat on the mat. Was it the dog-house? \u201cThis isn't mine!\u201d she said; version 3.11 came\n"
    "    return self.items(first)\n\n# comment of the caf\u00e9.\nA line that goes on and on, without an end"
)


def _tokens(text: str, folder: Path) -> tuple[npt.NDArray[np.int64], int]:
    """After as many tokens again, so that all of the text is scored; and its length."""
    tokens = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    return np.array([tokens[:1] * (len(tokens) + 1) + tokens + tokens[:1]]), len(tokens)


def test_last_words_are_those_a_reader_would_mark(family_folder: Path) -> None:
    tokenizer = load_tokenizer(family_folder)
    chunks_BT, _ = _tokens(_TEXT, family_folder)
    first_target = scored_positions(chunks_BT.shape[1]).start + 1
    found = [
        tokenizer.decode(chunks_BT[0, first_target + word.first : first_target + word.stop]).strip(" (.\n\u201d!?)")
        for word in find_last_words(chunks_BT, tokenizer)
    ]
    assert found == ["mat", "dog-house", "mine", "came", "first", "caf\u00e9"]


def test_words_in_the_half_that_is_not_scored_are_not_asked(fine_folder: Path) -> None:
    tokenizer = load_tokenizer(fine_folder)
    chunks_BT, n_tokens = _tokens(_TEXT, fine_folder)
    not_scored = np.roll(chunks_BT, -n_tokens, axis=1)
    assert find_last_words(np.concatenate([not_scored, chunks_BT]), tokenizer) == [
        LastWord(1, word.first, word.stop) for word in find_last_words(chunks_BT, tokenizer)
    ]


def test_a_tokenizer_that_tells_no_text_asks_nothing() -> None:
    assert find_last_words(np.zeros((2, 16), dtype=np.int64), object()) == []


def test_an_answer_is_right_where_greedy_decoding_writes_the_word(
    toy_checkpoint: Callable[..., Path], heldout_tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=2)
    chunks_BT = heldout_tokens[6000 : 6000 + 3 * 128].reshape(3, 128)
    words = find_last_words(chunks_BT, load_tokenizer(folder))
    source = open_source(folder)
    writer = LogProbWriter(tmp_path / "own", 3 * 63, source.spec.vocab_size)
    backend = TorchBackend(Student.teacher(source))
    evaluate(backend, chunks_BT, {}, record=writer)
    evaluation = evaluate(backend, chunks_BT, {"teacher": LogProbReader(tmp_path / "own")})
    right_BS = evaluation.right_N.reshape(3, -1)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    n_right = 0
    for word in words:
        first, stop = 65 + word.first, 65 + word.stop
        prompt = torch.from_numpy(chunks_BT[word.chunk, None, :first])
        written = stock.generate(
            prompt, max_new_tokens=stop - first, min_new_tokens=stop - first, do_sample=False, pad_token_id=0
        )
        expected = written[0, first:].tolist() == chunks_BT[word.chunk, first:stop].tolist()
        assert right_BS[word.chunk, word.first : word.stop].all() == expected
        n_right += expected
    assert 0 < n_right < len(words), "both answers must occur, or nothing is shown"
    np.testing.assert_array_equal(evaluation.against["teacher"].right_N, evaluation.right_N)
    figures = cloze_figures(evaluation.right_N, evaluation.right_N, words, ["a", "b", "b"])
    assert figures is not None
    assert figures["accuracy"] == n_right / len(words)


def test_figures_by_domain() -> None:
    """Four chunks of two domains; a word of two tokens is found when both are."""
    words = [LastWord(0, 0, 2), LastWord(0, 3, 4), LastWord(1, 0, 1), LastWord(3, 1, 2)]
    right_BS = np.array([[1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=np.bool_)
    teacher_BS = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=np.bool_)
    figures = cloze_figures(right_BS.ravel(), teacher_BS.ravel(), words, ["code", "code", "prose", "prose"])
    assert figures is not None
    assert (figures["words"], figures["accuracy"], figures["teacher_accuracy"]) == (4, 0.5, 0.75)
    assert figures["kept"] == pytest.approx(2 / 3)
    code, prose = figures["domains"]["code"], figures["domains"]["prose"]
    assert (code["words"], code["accuracy"], code["kept"]) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    # draws of two chunks: 1 of 2, 2 of 3 or 2 of 2 words are found
    assert code["accuracy_interval"] == pytest.approx((0.5, 1.0))
    assert (prose["words"], prose["accuracy"], prose["kept"], prose["kept_interval"]) == (1, 0.0, None, None)
    assert cloze_figures(right_BS.ravel(), teacher_BS.ravel(), [], ["code"] * 4) is None


def test_words_are_saved(tmp_path: Path) -> None:
    words = [LastWord(0, 3, 5), LastWord(7, 0, 1)]
    save_last_words(words, tmp_path / "words.json")
    assert load_last_words(tmp_path / "words.json") == words

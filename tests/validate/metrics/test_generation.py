"""The definition of a loop, and texts that a runtime writes against torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from compressors.model.predictions.drawn_token import drawn_token
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover.drafted_texts import Effort
from exporter.stages.teacher.texts import drafts_of, streamed_texts
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.generation import (
    NEW_TOKENS,
    GeneratedTexts,
    example_of,
    example_prompt,
    generate_texts,
    generation_figures,
    largest_share_by_chance,
    least_difference,
    longest_repeat,
    loops,
    prompts_of,
    rate_interval,
)
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.drafts import Drafter, Wish
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_TEXT = list(range(100, 150))  # no token twice


@pytest.mark.parametrize("cycle", range(1, 17))
def test_a_cycle_three_times_over_is_a_loop(cycle: int) -> None:
    """At least 8 tokens in all, so short cycles need more rounds."""
    rounds = max(3, -(-8 // cycle))
    assert loops(_TEXT + list(range(cycle)) * rounds)


@pytest.mark.parametrize("cycle", range(1, 17))
def test_one_token_less_is_not(cycle: int) -> None:
    shortest = max(3 * cycle, 8)
    looping = (list(range(cycle)) * 8)[:shortest]
    assert loops(_TEXT + looping)
    assert not loops(_TEXT + looping[1:])


def test_a_longer_cycle_is_not_looked_for() -> None:
    assert not loops(list(range(17)) * 3)


@pytest.mark.parametrize("shift", range(5))
def test_it_does_not_matter_where_in_the_cycle_the_text_ends(shift: int) -> None:
    assert loops(_TEXT + (list(range(5)) * 4)[: 15 + shift])


def test_a_loop_that_the_text_got_out_of_does_not_count() -> None:
    assert not loops([7] * 40 + _TEXT)
    assert not loops([7] * 40 + [8])


@pytest.mark.parametrize("position", range(-15, 0))
def test_one_different_token_breaks_it(position: int) -> None:
    tokens = _TEXT + [0, 1, 2, 3, 4] * 3
    tokens[position] = 99
    assert not loops(tokens)


@pytest.mark.parametrize("tokens", [[], [1], [1] * 7, [1, 2] * 3, _TEXT, [1, 1, 2, 2, 1, 1, 2, 3]])
def test_what_is_no_loop(tokens: list[int]) -> None:
    assert not loops(tokens)


def test_random_text_hardly_ever_loops() -> None:
    generator = np.random.default_rng(0)
    n_loops = sum(loops(generator.integers(0, 50, 64).tolist()) for _ in range(2000))
    assert n_loops == 0


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([], 0), ([5], 0), ([1, 2, 3], 0), ([1, 2, 1], 1), ([1, 2, 3, 9, 1, 2, 3, 8], 3), ([4] * 10, 9), ([1, 2] * 5, 8)],
)
def test_the_longest_repeat_may_overlap_itself(tokens: list[int], length: int) -> None:
    assert longest_repeat(tokens) == length


@pytest.mark.parametrize("n_yes", [0, 1, 11, 24])
def test_the_interval_of_a_rate_is_wilson_s(n_yes: int) -> None:
    expected = binomtest(n_yes, 24).proportion_ci(method="wilson")
    assert rate_interval(n_yes, 24) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_difference_of_two_shares_is_newcombe_s() -> None:
    """His first example, 56 of 70 against 48 of 80: 0.0524 to 0.3339 by method 10."""
    assert least_difference(56, 70, 48, 80) == pytest.approx(0.0524, abs=5e-5)
    assert -least_difference(48, 80, 56, 70) == pytest.approx(0.3339, abs=5e-5)


@pytest.mark.parametrize(("original", "most"), [(0, 4), (10, 16), (24, 24)])
def test_how_many_more_may_loop_by_chance(original: int, most: int) -> None:
    assert largest_share_by_chance(original, 24) == most / 24


def test_prompts_come_from_everywhere() -> None:
    chunks_BT = np.arange(100)[:, None] * 1000 + np.arange(512)
    prompts_PT = prompts_of(chunks_BT)
    assert prompts_PT.shape == (24, 32)
    assert (prompts_PT[:, 0] % 1000 == 0).all(), "where a chunk begins, with BOS if it has one"
    for domain in range(5):  # of 20 chunks each
        assert 4 <= (prompts_PT[:, 0] // 20_000 == domain).sum() <= 5
    assert prompts_of(chunks_BT[:3])[:, 0].tolist() == [0, 1000, 2000]


def test_figures_end_at_the_end_of_text() -> None:
    looping = [3] * 64
    ended = [1, 2, 3, 1, 2, 0, *range(10, 68)]
    plain = list(range(100, 164))
    greedy_PN, sampled_PN = np.array([looping, ended, plain, plain]), np.array([plain, plain, ended, ended])
    figures = generation_figures(GeneratedTexts(greedy_PN, sampled_PN, np.array(ended)), [0, 5])
    assert figures["prompts"] == 4
    greedy = figures["greedy"]
    assert (greedy["loop_rate"], greedy["end_of_text_rate"]) == (0.25, 0.25)
    assert (greedy["longest_repeat_mean"], greedy["longest_repeat_max"]) == ((63 + 2) / 4, 63)
    sampled = figures["sampled"]
    assert (sampled["loop_rate"], sampled["end_of_text_rate"], sampled["longest_repeat_max"]) == (0.0, 0.5, 2)
    assert sampled["end_of_text_rate_interval"] == rate_interval(2, 4)


def test_the_example_is_after_a_prompt_at_a_fixed_place() -> None:
    texts_PN = np.array([[3] * 64] * 4)
    prompts_PT = np.arange(4 * 32).reshape(4, 32)

    def decode(tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    written = GeneratedTexts(texts_PN, texts_PN, np.array([7, 8, 0, *range(61)]))
    example = example_of(prompts_PT, written, [0], decode)
    assert example["prompt"] == decode(list(range(64, 96)))
    assert (example["text"], example["temperature"]) == ("7 8", 0.5), "an end of text ends it"
    assert [example_prompt(n_prompts) for n_prompts in (1, 2, 24)] == [0, 1, 16]


_Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def toy_folder(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2)


@pytest.fixture(scope="module")
def prompts_PT(heldout_tokens: _Tokens) -> _Tokens:
    return prompts_of(heldout_tokens[: 3 * 512].reshape(3, 512))


@pytest.fixture(scope="module")
def expected(toy_folder: Path, prompts_PT: _Tokens) -> GeneratedTexts:
    """Stock transformers, without a cache."""
    stock = AutoModelForCausalLM.from_pretrained(toy_folder, dtype=torch.float32)
    texts = {way: torch.from_numpy(prompts_PT) for way in ("greedy_PN", "sampled_PN", "example_PN")}
    with torch.no_grad():
        for place in range(NEW_TOKENS):
            for way, text_PT in texts.items():
                logits_PV = stock(text_PT, use_cache=False).logits[:, -1]
                waits_PV = torch.stack([_waits(prompt, place, logits_PV.shape[1]) for prompt in range(len(logits_PV))])
                if way != "greedy_PN":
                    logits_PV = (logits_PV / (0.5 if way == "example_PN" else 1)).double() - waits_PV.log()
                texts[way] = torch.cat([text_PT, logits_PV.argmax(-1)[:, None]], dim=1)
    new = {way: text_PT[:, prompts_PT.shape[1] :].numpy() for way, text_PT in texts.items()}
    return GeneratedTexts(new["greedy_PN"], new["sampled_PN"], new["example_PN"][2])


def _waits(prompt: int, place: int, vocab_size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([prompt, place]).standard_exponential(vocab_size))


def _assert_equal(texts: GeneratedTexts, expected: GeneratedTexts) -> None:
    np.testing.assert_array_equal(texts.greedy_PN, expected.greedy_PN)
    np.testing.assert_array_equal(texts.sampled_PN, expected.sampled_PN)
    np.testing.assert_array_equal(texts.example_N, expected.example_N)


def test_the_teacher_s_texts_are_those_of_stock_transformers(
    toy_folder: Path, prompts_PT: _Tokens, expected: GeneratedTexts, tmp_path: Path
) -> None:
    """Also where there is no memory for keys and values."""
    teacher = Student.teacher(open_source(toy_folder))
    done: list[int] = []
    alone, effort = streamed_texts(StreamedModel(teacher), prompts_PT, done.append)
    _assert_equal(alone, expected)
    assert effort == Effort(passes=NEW_TOKENS, drafted=0, accepted=0)
    assert sum(done) == 2 * expected.greedy_PN.size + NEW_TOKENS
    without_room = StreamedModel(teacher, limit=MemoryLimit(1, tmp_path))
    limited, effort = streamed_texts(without_room, prompts_PT, done.append)
    _assert_equal(limited, expected)
    assert effort.passes == NEW_TOKENS
    assert (expected.greedy_PN != expected.sampled_PN).any()
    assert len({tuple(text) for text in expected.sampled_PN.tolist()}) == len(prompts_PT)


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime"])
def test_a_runtime_s_texts_are_those_of_stock_transformers(
    runtime: str, toy_folder: Path, prompts_PT: _Tokens, expected: GeneratedTexts, tmp_path: Path
) -> None:
    """Of float32 files, sampled ones too: the numbers that draw are the same."""
    student = Student.teacher(open_source(toy_folder))
    backend: RuntimeBackend
    if runtime == "llama.cpp":
        write_gguf(student, "F32", tmp_path / "toy.gguf", name="toy", threads=1)
        backend = LlamaCppBackend(tmp_path / "toy.gguf", kv_type="f32", threads=1)
    else:
        write_onnx(student, "F32", tmp_path / "onnx", threads=1)
        backend = OnnxRuntimeBackend(tmp_path / "onnx", threads=1)
    done: list[int] = []
    _assert_equal(generate_texts(backend, prompts_PT, done.append), expected)
    assert sum(done) == 2 * len(prompts_PT) + 1


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_a_coarse_file_drafts_the_teacher_s_texts(
    artifact: str, toy_folder: Path, prompts_PT: _Tokens, expected: GeneratedTexts, tmp_path: Path
) -> None:
    """They are the teacher's in far fewer passes; a limit changes where drafts are checked, and no token."""
    teacher = Student.teacher(open_source(toy_folder))
    if artifact == "gguf":
        path = tmp_path / "toy.gguf"
        write_gguf(teacher, "Q4_0", path, name="toy", threads=1)
    else:
        path = tmp_path / "onnx"
        write_onnx(teacher, "Q4_0", path, threads=1)
    n_tokens = prompts_PT.shape[1] + NEW_TOKENS
    with Drafter(artifact, path, n_texts=2 * len(prompts_PT) + 1, n_tokens=n_tokens, threads=1) as drafter:
        draft = drafts_of(drafter, *prompts_PT.shape)
        texts, effort = streamed_texts(StreamedModel(teacher), prompts_PT, lambda _: None, draft)
        assert drafter.error is None
        assert 20_000_000 < drafter.own_bytes < 400_000_000
    _assert_equal(texts, expected)
    assert effort.passes <= 24
    assert 0.5 < effort.accepted / effort.drafted < 1


def test_a_runtime_that_dies_drafts_no_more(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, but not really")
    with Drafter("gguf", path, n_texts=1, n_tokens=40, threads=1) as drafter:
        assert drafter.own_bytes == 0
        assert drafter.draft([Wish(0, [1, 2], 4)]) == [[]]
        assert drafter.draft([Wish(0, [1, 2], 4)]) == [[]]
        assert drafter.error is not None
        assert f"{path} cannot be loaded by llama.cpp" in drafter.error


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits_V = np.array([0.3, -2.0, 1.1, -np.inf, 0.0], dtype=np.float32)
    n = 10_000
    found_V = np.bincount([drawn_token(logits_V, (7, place)) for place in range(n)], minlength=5) / n
    probabilities_V = np.exp(logits_V) / np.exp(logits_V).sum()
    assert found_V == pytest.approx(probabilities_V, abs=4 * (0.25 / n) ** 0.5)


def test_similar_models_mostly_draw_the_same_token() -> None:
    """At most 2 D / (1 + D) of the draws differ at the total variation distance D; more tokens at the end do not."""
    generator = np.random.default_rng(5)
    logits_V = generator.normal(0, 2, 1000).astype(np.float32)
    other_V = logits_V + generator.normal(0, 0.1, 1000).astype(np.float32)
    first_V, second_V = (np.exp(values) / np.exp(values).sum() for values in (logits_V, other_V))
    distance = np.abs(first_V - second_V).sum() / 2
    n = 2000
    longer_V = np.append(other_V, np.float32(-np.inf))
    differ = sum(drawn_token(logits_V, (place,)) != drawn_token(longer_V, (place,)) for place in range(n)) / n
    assert 0 < differ < 2 * distance / (1 + distance) + 3 * (distance / n) ** 0.5

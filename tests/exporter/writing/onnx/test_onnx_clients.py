"""Other programs use the folder: onnxruntime-genai generates from it, transformers reads its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai
import pytest
from transformers import AutoConfig, AutoTokenizer

from compressors.model.config.reading import read_spec
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.encodings import PRESETS
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.writing.onnx.genai import continue_batch, continue_prompt
from validate.metrics.generation import greedy
from validate.runtimes.onnx import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def student(family_folder: Path) -> Student:
    """Each trained model with six experts left."""
    source = Checkpoint(family_folder)
    return Student(source, ExpertMap.keeping(source.spec.n_experts, ((0, 2, 3, 5, 6, 7),) * source.spec.n_layers))


_MIXED = {"embedding": "4@64", "layers.0.experts": "8@32", "layers.1.experts": "2@32", "layers.2.q_proj": "2@64"}


@pytest.fixture(scope="module", params=[*sorted(PRESETS), "mixed"])
def folder(request: pytest.FixtureRequest, student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's whole ONNX folder, in each preset and in a mix of encodings."""
    path = tmp_path_factory.mktemp("onnx")
    preset, encodings = ("Q4_0", _MIXED) if request.param == "mixed" else (request.param, {})
    write_onnx(student, preset, path, encodings=encodings, threads=1)
    write_client_files(student, path)
    return path


def test_genai_generates_the_same_tokens(folder: Path) -> None:
    """The prompt is longer than genai's chunk of 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode("The lamp stood on the table by the window. " * 60)[:600]
    expected = OnnxRuntimeBackend(folder, threads=1).generate(prompt, 24, greedy)
    tokens, _ = continue_prompt(folder, prompt, len(expected))
    assert tokens and tokens == expected[: len(tokens)]
    assert len(tokens) == len(expected) or tokenizer.eos_token_id in expected[: len(tokens) + 1]


def test_genai_generates_the_same_tokens_in_a_batch(folder: Path) -> None:
    """Its rows are of different lengths, so that the last position of one is padding."""
    prompts = ["The lamp stood on the table by the", "And the", "The lamp"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = OnnxRuntimeBackend(folder, threads=1)
    for prompt, found in zip(prompts, continue_batch(folder, prompts, 8), strict=True):
        expected = backend.generate(tokenizer.encode(prompt), 8, greedy)
        ends = expected.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in expected else len(expected)
        assert found[:ends] == expected[:ends]


def test_genai_reads_the_tokenizer(folder: Path) -> None:
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    text = "The lamp stood on the table."
    assert tokenizer.encode(text).tolist() == AutoTokenizer.from_pretrained(folder).encode(text)


def test_config_describes_the_student(folder: Path, student: Student) -> None:
    assert read_spec(folder) == student.spec
    assert AutoConfig.from_pretrained(folder).num_experts_per_tok == student.spec.top_k
    genai = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == student.spec.context_length

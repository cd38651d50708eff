"""Both runtimes know whether a text begins with BOS; llama-perplexity's chunks then do too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_BOS = "<|im_start|>"


@pytest.fixture
def student(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> Student:
    return Student.teacher(open_source(toy_checkpoint(tmp_path, n_layers=1)))


def _begin_texts_with_bos(folder: Path) -> int:
    """Writes a tokenizer that puts BOS before a text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos: int = tokenizer.token_to_id(_BOS)
    tokenizer.post_processor = TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "bos_token": _BOS}), encoding="utf-8")
    return bos


@pytest.mark.parametrize("with_bos", [True, False])
def test_runtimes_know_the_token_before_a_text(student: Student, tmp_path: Path, with_bos: bool) -> None:
    bos = _begin_texts_with_bos(student.source.path) if with_bos else None
    write_gguf(student, "Q8_0", tmp_path / "model.gguf", name="x", threads=1)
    assert LlamaCppBackend(tmp_path / "model.gguf", threads=1).bos_token == bos
    write_onnx(student, "Q4_0", tmp_path / "onnx", importance=None, threads=1, progress=None)
    backend = OnnxRuntimeBackend(tmp_path / "onnx", threads=1)
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        _ = backend.bos_token
    write_client_files(student, tmp_path / "onnx")
    assert backend.bos_token == bos

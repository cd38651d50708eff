"""Files of our own exporter raise no symptom for any original's folder; damage beside the graph does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.publishing.deviations import Deviation
from exporter.validation.static_checks import check_description, expected_spec
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from tests.altered import with_dense_layers
from validate.files.model_file import ModelFile

_BASE, _END = 0, 2  # <|endoftext|> and <|im_end|> of the bundled tokenizer

_GENERATION: Mapping[str, Mapping[str, Any] | None] = {
    "several ends, no padding": {"eos_token_id": [_END, _BASE]},
    "one end": {"eos_token_id": _END, "temperature": 0.7, "do_sample": True},
    "no ids": {"top_p": 0.8},
    "all": {"bos_token_id": _BASE, "eos_token_id": _END, "pad_token_id": _BASE},
    "no such file": None,
}


@pytest.fixture(scope="module")
def source(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the bundled model, with two chat templates."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("source"), n_layers=1)
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def graph(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(Student.teacher(open_source(source)), "Q4_0", folder, threads=1)
    return folder


def test_the_expected_shape_follows_from_the_file(source: Path, tmp_path: Path) -> None:
    """By the tensors of experts: another tensor of three dimensions does not count."""
    checkpoint = open_source(source)
    kept = ExpertMap.keeping(32, [(0, 3, 5, 7, 9)])
    write_gguf(Student(checkpoint, kept), "F16", tmp_path / "five.gguf", name="five", threads=1)
    file = ModelFile("gguf", tmp_path / "five.gguf")
    assert expected_spec(file, checkpoint.spec) == checkpoint.spec.with_experts(5)
    assert expected_spec(file, with_dense_layers(checkpoint.spec, 1)) is None


def _symptoms(file: ModelFile, source: Path, tokens: npt.NDArray[np.int64]) -> list[str]:
    checkpoint = open_source(source)
    return check_description(file, checkpoint, checkpoint.spec, tokens[:256].reshape(2, 128)).symptoms


@pytest.mark.parametrize("case", _GENERATION)
def test_an_undamaged_folder_raises_no_symptom(
    case: str, source: Path, graph: Path, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    folder, generation = tmp_path / "source", _GENERATION[case]
    shutil.copytree(source, folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    written = tmp_path / "onnx"
    shutil.copytree(graph, written)
    write_client_files(Student.teacher(open_source(folder)), written)
    assert _symptoms(ModelFile("onnx", written / "model.onnx"), folder, heldout_tokens) == []


def _truncated(tokenizer: dict[str, Any]) -> None:
    tokenizer["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}


def _decoded_otherwise(tokenizer: dict[str, Any]) -> None:
    tokenizer["decoder"] = {"type": "Fuse"}


@pytest.mark.parametrize(
    ("damage", "symptom"), [(_truncated, "truncation is"), (_decoded_otherwise, "are turned back into")]
)
def test_what_clients_do_with_texts_is_compared(
    damage: Callable[[dict[str, Any]], None],
    symptom: str,
    source: Path,
    graph: Path,
    tmp_path: Path,
    heldout_tokens: npt.NDArray[np.int64],
) -> None:
    written = tmp_path / "onnx"
    shutil.copytree(graph, written)
    write_client_files(Student.teacher(open_source(source)), written)
    tokenizer = json.loads((written / "tokenizer.json").read_text(encoding="utf-8"))
    damage(tokenizer)
    (written / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert any(symptom in line for line in _symptoms(ModelFile("onnx", written / "model.onnx"), source, heldout_tokens))


def test_every_chat_template_of_a_gguf_file_is_compared(
    source: Path, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(Student.teacher(open_source(source)), "Q8_0", path, name="x", threads=1)
    assert _symptoms(ModelFile("gguf", path), source, heldout_tokens) == []
    path.write_bytes(path.read_bytes().replace(b"{{ tools }}", b"{{ spoon }}"))
    (symptom,) = _symptoms(ModelFile("gguf", path), source, heldout_tokens)
    assert "chat template 'tool_use' is another from character 3 on" in symptom


def test_brackets_in_a_deviation_are_no_markup() -> None:
    """Texts of a model may hold what looks like a closing tag of the table's library."""
    from rich.table import Table

    from exporter.cli import _console

    table = Table(show_header=False, box=None)
    table.add_row("differs", Deviation("gguf", "'<s>[INST] Hi [/INST]' is cut otherwise").what)
    console = _console()
    with console.capture() as captured:
        console.print(table)
    assert "[INST] Hi [/INST]" in captured.get()

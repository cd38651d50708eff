"""All end tokens of a model reach every file that a client reads them from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from compressors.model.config.reading import read_spec
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.clients import write_client_files
from validate.vocabulary.vocabulary import GgufVocabulary

_BASE, _END = 0, 2  # <|endoftext|> and <|im_end|> of the bundled tokenizer


@pytest.fixture(scope="module")
def source(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the bundled model, with a chat model's two end tokens in generation_config.json."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("source"), n_layers=1)
    generation = {"eos_token_id": [_END, _BASE], "pad_token_id": _BASE, "temperature": 0.7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}", encoding="utf-8")
    return folder


def _read(path: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    return data


def test_llama_cpp_ends_at_both(source: Path, tmp_path: Path) -> None:
    write_gguf(Student.teacher(open_source(source)), "Q8_0", tmp_path / "model.gguf", name="x", threads=1)
    assert GgufVocabulary(tmp_path / "model.gguf").end_tokens == {_BASE, _END}


def test_the_onnx_folder_names_both(source: Path, tmp_path: Path) -> None:
    write_client_files(Student.teacher(open_source(source)), tmp_path)
    assert _read(tmp_path / "genai_config.json")["model"]["eos_token_id"] == [_END, _BASE]
    assert _read(tmp_path / "generation_config.json") == _read(source / "generation_config.json")
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [_END, _BASE]
    assert read_spec(tmp_path).eos_token_ids == (_END, _BASE)
    assert set(AutoTokenizer.from_pretrained(tmp_path).chat_template) == {"default", "tool_use"}


def test_the_tokenizers_end_token_is_named_where_no_configuration_does(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != "generation_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = dict(_read(source / "config.json"))
    config["eos_token_id"] = _END
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_client_files(Student.teacher(open_source(folder)), tmp_path)
    assert _read(tmp_path / "generation_config.json")["eos_token_id"] == [_END, _BASE]
    assert _read(tmp_path / "genai_config.json")["model"]["eos_token_id"] == [_END, _BASE]


def test_the_saved_student_ends_as_its_source(source: Path, tmp_path: Path) -> None:
    write_checkpoint(Student.teacher(open_source(source)), tmp_path / "student")
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [_END, _BASE]
    assert set(AutoTokenizer.from_pretrained(tmp_path / "student").chat_template) == {"default", "tool_use"}

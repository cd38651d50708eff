"""What llama.cpp itself changes about special tokens is no fault of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.files.gguf.gguf_file import GgufFile
from tests.llama_vocabulary import write_vocabulary
from validate.vocabulary.original_tokenizer import OriginalTokenizer
from validate.vocabulary.tokenizer_check import TokenizerFindings, check_gguf_tokenizer

_ROWS = 4200
_FIRST_FREE = 4096


@pytest.fixture
def folder(fine_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint's small files, with rows for more tokens."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": _ROWS}), encoding="utf-8")
    return tmp_path


def _add_special(folder: Path, *texts: str) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    first = data["added_tokens"][0]
    data["added_tokens"] += [first | {"id": number, "content": text} for number, text in enumerate(texts, _FIRST_FREE)]
    path.write_text(json.dumps(data), encoding="utf-8")


def _check(folder: Path, original: Path) -> TokenizerFindings:
    path = folder / "vocabulary.gguf"
    write_vocabulary(folder, path)
    tokenizer = OriginalTokenizer(original, read_spec(original).vocab_size)
    return check_gguf_tokenizer(path, GgufFile(path).metadata, tokenizer, [], lambda: None)


@pytest.mark.parametrize("text", ["<|channel|>", "<|start|>", "<unused7>", "<|tool_call>"])
def test_tokens_that_llama_cpp_shows_or_calls_unused_are_as_in_the_original(folder: Path, text: str) -> None:
    _add_special(folder, text)
    assert not [said for said in _check(folder, folder).symptoms if text in said]


def test_another_token_at_its_place_is_found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = tmp_path_factory.mktemp("original") / "folder"
    shutil.copytree(folder, original)
    _add_special(folder, "<unused8>")
    _add_special(original, "<unused7>")
    assert any("token 4096 is '<unused8>', not '<unused7>'" in said for said in _check(folder, original).symptoms)

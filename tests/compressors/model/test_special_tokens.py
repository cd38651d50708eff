"""End tokens as transformers reads them, from every source, and invalid ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GenerationConfig

from compressors.model.config.reading import read_spec
from compressors.model.config.special_tokens import configured_tokens, special_tokens
from compressors.model.errors import InputError

_ROWS = 4096
Write = Callable[..., Path]


@pytest.fixture
def write(fine_folder: Path, tmp_path: Path) -> Write:
    """Writes small files over the model's own: ``write(config={...}, generation={...}, tokenizer={...})``."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)

    def edit(**changes: dict[str, object]) -> Path:
        files = {
            "config": "config.json",
            "generation": "generation_config.json",
            "tokenizer": "tokenizer_config.json",
        }
        for key, values in changes.items():
            path = tmp_path / files[key]
            before = json.loads(path.read_text("utf-8")) if path.exists() else {}
            path.write_text(json.dumps(before | values), encoding="utf-8")
        return tmp_path

    return edit


def test_generation_config_stands_over_config(write: Write) -> None:
    folder = write(config={"eos_token_id": 0}, generation={"eos_token_id": [2, 0], "pad_token_id": 1})
    tokens = configured_tokens(folder, _ROWS)
    assert (tokens.ends, tokens.pad) == ((2, 0), 1)
    assert tokens.ends == tuple(GenerationConfig.from_pretrained(folder).eos_token_id)
    assert read_spec(folder).eos_token_ids == (2, 0)
    assert read_spec(folder).pad_token_id == 1


def test_config_speaks_where_generation_config_is_silent(write: Write) -> None:
    folder = write(config={"eos_token_id": [5, 5, 7]}, generation={"do_sample": True, "eos_token_id": None})
    assert configured_tokens(folder, _ROWS).ends == (5, 7)


def test_text_config_is_read(write: Write) -> None:
    folder = write(config={"eos_token_id": None, "text_config": {"eos_token_id": 9}})
    assert configured_tokens(folder, _ROWS).ends == (9,)


def test_the_tokenizers_own_end_token_ends_texts_too(write: Write) -> None:
    folder = write(generation={"eos_token_id": [2]})
    assert special_tokens(folder, _ROWS).ends == (2, 0)
    folder = write(tokenizer={"eos_token": "<|im_end|>"})
    assert special_tokens(folder, _ROWS).ends == (2,)


def test_a_model_may_have_no_end_token(write: Write) -> None:
    folder = write(config={"eos_token_id": None}, tokenizer={"eos_token": None})
    assert special_tokens(folder, _ROWS).ends == ()


@pytest.mark.parametrize("value", [-1, 1.5, "2", [[2]], [None], True, {"id": 2}, 2**31, [2, "x"]])
@pytest.mark.parametrize("file", ["config", "generation"])
def test_what_is_no_token_id_is_refused_by_name(write: Write, value: object, file: str) -> None:
    folder = write(**{file: {"eos_token_id": value}})
    name = {"config": "config.json", "generation": "generation_config.json"}[file]
    with pytest.raises(InputError, match=rf"/{re.escape(name)}: eos_token_id must be"):
        read_spec(folder)


def test_an_end_token_without_row_is_left_out_where_another_is_left(write: Write) -> None:
    folder = write(config={"eos_token_id": [50279, 2]})
    assert configured_tokens(folder, _ROWS).ends == (2,)
    assert configured_tokens(folder, _ROWS).without_row == (50279,)
    folder = write(config={"eos_token_id": 50279}, tokenizer={"eos_token": None})
    with pytest.raises(InputError, match="eos_token_id is 50279, but the model has 4096 tokens"):
        special_tokens(folder, _ROWS)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_begin_and_padding_outside_of_the_vocabulary_are_refused(write: Write, key: str) -> None:
    with pytest.raises(InputError, match=rf"{key} is 4096, but vocab_size is 4096"):
        read_spec(write(config={key: 4096}))

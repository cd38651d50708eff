"""The tokenizer beside written weights is the original's, in files that transformers 4.57 and 5 read.

That 4.57 does read them is seen by ``make peers``, which has it in an environment of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.writing.tokenizer_copy import copy_tokenizer

_TEXTS = ("Hello, w\u00f6rld\n\n  def f(x):", "<|im_start|>user\nhi<|im_end|><|endoftext|>", "")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"extra_special_tokens": {"image_token": "<|im_end|>"}},
        {"additional_special_tokens": ["<|im_end|>"]},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "Qwen2Tokenizer"},
    ],
    ids=str,
)
def test_the_copy_is_the_same_tokenizer(settings: dict[str, Any], fine_folder: Path, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        folder.mkdir()
        shutil.copyfile(fine_folder / "config.json", folder / "config.json")
    shutil.copyfile(fine_folder / "tokenizer.json", source / "tokenizer.json")
    original = json.loads((fine_folder / "tokenizer_config.json").read_text(encoding="utf-8")) | settings
    (source / "tokenizer_config.json").write_text(json.dumps(original), encoding="utf-8")
    copy_tokenizer(source, copy)
    written = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert not isinstance(written.get("extra_special_tokens"), list), "4.57 wants names there"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, copy))
    assert type(before) is type(after)
    assert before.backend_tokenizer.to_str() == after.backend_tokenizer.to_str()
    assert before.special_tokens_map == after.special_tokens_map
    assert (before.all_special_tokens, before.all_special_ids) == (after.all_special_tokens, after.all_special_ids)
    assert (before.model_max_length, before.padding_side) == (after.model_max_length, after.padding_side)
    assert [before.encode(text) for text in _TEXTS] == [after.encode(text) for text in _TEXTS]


def test_files_that_both_read_already_are_copied_byte_for_byte(fine_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(fine_folder, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors")))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class":"PreTrainedTokenizerFast"}', encoding="utf-8")
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(source, copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()

"""A tokenizer that the installed libraries refuse gives one sentence: the file, the part at fault, the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from compressors.model.files.tokenizer_files import (
    class_with_other_words,
    load_tokenizer,
    read_tokenizer_json,
    tokens_of,
)
from compressors.model.files.vocabularies.made_files import named_code

Edit = Callable[[dict[str, Any]], object]
_UNKNOWN = {"type": "Novel", "setting": 1}
_BROKEN = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}


@pytest.fixture
def folder(fine_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint's small files, to be damaged."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)
    return tmp_path


def _edit(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda data: data["model"].update(type="SuperBPE"), "model of type 'SuperBPE'"),
        (lambda data: data["model"]["vocab"].update(zz=-1), "model of type 'BPE'"),
        (lambda data: data["model"]["merges"].append(["zzz", "qqq"]), "model of type 'BPE'"),
        (lambda data: data.update(pre_tokenizer=_UNKNOWN), "pre_tokenizer of type 'Novel'"),
        (lambda data: data.update(pre_tokenizer=_BROKEN), "pre_tokenizer of type 'Split'"),
        (lambda data: data["pre_tokenizer"]["pretokenizers"].append(_UNKNOWN), r"pre_tokenizer \(Split, .*, Novel\)"),
        (lambda data: data.update(normalizer=_UNKNOWN), "normalizer of type 'Novel'"),
        (lambda data: data.update(decoder=_UNKNOWN), "decoder of type 'Novel'"),
        (lambda data: data["added_tokens"].append({"id": "x"}), "added_tokens"),
        (lambda data: data.update(version="2.0"), "contents"),
    ],
)
def test_the_part_at_fault_is_named(folder: Path, edit: Edit, part: str) -> None:
    _edit(folder / "tokenizer.json", edit)
    for load in (load_tokenizer, lambda folder: read_tokenizer_json(folder / "tokenizer.json")):
        with pytest.raises(
            InputError, match=rf"tokenizer\.json: its {part} cannot be read by .* tokenizers \d"
        ) as caught:
            load(folder)
        assert "pip install --upgrade tokenizers" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_panic_in_the_library_is_a_sentence_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _edit(folder / "tokenizer.json", lambda data: data["model"].update(continuing_subword_prefix="##"))
    with pytest.raises(InputError, match="model of type 'BPE'"):
        load_tokenizer(folder)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", "5", '{"eos_token": 5}', '{"eos_token": {"content": 1}}'])
def test_a_damaged_tokenizer_config_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer_config"):
        load_tokenizer(folder)


def test_without_tokenizer_json_the_message_says_how_to_make_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"no tokenizer\.json.*save_pretrained"):
        load_tokenizer(folder)


def test_foreign_code_is_named_and_never_run(folder: Path) -> None:
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(code), encoding="utf-8")
    (folder / "tokenization_own.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    assert load_tokenizer(folder).encode("a")
    assert named_code(folder) == "tokenization_own.OwnTokenizer"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenization_own\.OwnTokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_without_a_token_for_the_text_is_an_input_error(folder: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    _edit(folder / "tokenizer.json", lambda data: data.update(model=words, added_tokens=[]))
    with pytest.raises(InputError, match=r"tokenizer|UNK"):
        tokens_of(folder, ["lamp"])


def test_what_was_read_is_forgotten_when_a_file_changes(folder: Path) -> None:
    assert load_tokenizer(folder) is load_tokenizer(folder)
    assert load_tokenizer(folder).eos_token == "<|endoftext|>"
    _edit(folder / "tokenizer_config.json", lambda data: data.update(eos_token="<|im_end|>"))
    assert load_tokenizer(folder).eos_token == "<|im_end|>"


def test_a_number_that_no_vocabulary_reaches_is_refused_before_the_library_makes_room_for_it(folder: Path) -> None:
    path = folder / "tokenizer.json"
    _edit(path, lambda data: data["model"]["vocab"].update(huge=2**32 - 1))
    for read in (lambda: load_tokenizer(folder), lambda: read_tokenizer_json(path)):
        with pytest.raises(InputError, match=r"token huge has number 4294967295, and no vocabulary is so large"):
            read()


@pytest.mark.parametrize(
    ("name", "changed"),
    [("PreTrainedTokenizerFast", None), ("Qwen2Tokenizer", None), ("GPT2Tokenizer", "GPT2Tokenizer")],
)
def test_a_class_with_an_expression_of_its_own_is_named(folder: Path, name: str, changed: str | None) -> None:
    _edit(folder / "tokenizer_config.json", lambda data: data.update(tokenizer_class=name))
    _edit(folder / "tokenizer.json", lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(trim_offsets=True))
    assert class_with_other_words(folder) == changed
    _edit(folder / "tokenizer.json", lambda data: data.update(pre_tokenizer=None))
    assert class_with_other_words(folder) is None

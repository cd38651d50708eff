"""A tokenizer that is read without transformers is transformers' own, and is only read where that is certain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from compressors.model.families.registry import supported_families
from compressors.model.files.plain_tokenizer import plain_tokenizer
from compressors.model.files.tokenizer_files import load_tokenizer
from validate.vocabulary.tokenization import AWKWARD_TEXTS, texts_around

_NAMES = ("bos_token", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id")


def test_it_is_what_transformers_makes_of_the_files(family_folder: Path) -> None:
    plain, whole = plain_tokenizer(family_folder), load_tokenizer(family_folder)
    assert plain is not None
    assert plain.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    assert {name: getattr(plain, name) for name in _NAMES} == {name: getattr(whole, name) for name in _NAMES}
    assert (plain.chat_template, plain.get_added_vocab()) == (whole.chat_template, whole.get_added_vocab())
    assert plain.convert_ids_to_tokens([0, 1, 300]) == whole.convert_ids_to_tokens([0, 1, 300])
    texts = [*AWKWARD_TEXTS, *texts_around(plain.get_added_vocab())]
    assert plain.encode_all(texts) == whole(texts, verbose=False)["input_ids"]
    as_text = whole(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert plain.encode_all(texts, add_special_tokens=False, special_as_text=True) == as_text
    assert [plain.encode(text) for text in texts] == plain.encode_all(texts)


_SETTINGS_OF_QWEN3 = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "unk_token": None,
}


@pytest.fixture
def qwen_folder(fine_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has the class, the settings and the further files of the published Qwen3 models."""
    folder = Path(shutil.copytree(fine_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in data["added_tokens"]}
    settings = {**_SETTINGS_OF_QWEN3, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("vocab.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_a_class_that_makes_the_same_steps_itself_is_what_transformers_makes(qwen_folder: Path) -> None:
    plain, whole = plain_tokenizer(qwen_folder), load_tokenizer(qwen_folder)
    assert plain is not None and type(whole).__name__ == "Qwen2Tokenizer"
    assert {name: getattr(plain, name) for name in _NAMES} == {name: getattr(whole, name) for name in _NAMES}
    assert plain.get_added_vocab() == whole.get_added_vocab()
    files = [json.loads(one.backend_tokenizer.to_str()) for one in (plain, whole)]
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor"):
        assert files[0][part] == files[1][part]
    for part in ("vocab", "merges"):
        assert files[0]["model"][part] == files[1]["model"][part]
    texts = [*AWKWARD_TEXTS, *texts_around(plain.get_added_vocab())]
    assert plain.encode_all(texts) == whole(texts, verbose=False)["input_ids"]
    as_text = whole(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert plain.encode_all(texts, add_special_tokens=False, special_as_text=True) == as_text


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(values)


_CHANGES: Mapping[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "a class of its own": ("tokenizer_config.json", _set(tokenizer_class="Qwen2Tokenizer")),
    "no class": ("tokenizer_config.json", _set(tokenizer_class=None)),
    "an unknown setting": ("tokenizer_config.json", _set(add_bos_token=True)),
    "a special token of its own": ("tokenizer_config.json", _set(bos_token="<s>")),
    "a special token with properties": ("tokenizer_config.json", _set(bos_token={"content": "<|endoftext|>"})),
    "truncation": ("tokenizer.json", _set(truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0})),
    "nothing behind the tokens": ("tokenizer.json", _set(post_processor=None)),
    "dropout": ("tokenizer.json", lambda data: data["model"].update(dropout=0.1)),
    "a part that the library does not know": ("tokenizer.json", _set(normalizer={"type": "Fold"})),
    "a special token that is normalized": (
        "tokenizer.json",
        lambda data: data["added_tokens"][0].update(normalized=True),
    ),
    "a family with a class of its own": ("config.json", _set(model_type="qwen3_5_moe_text")),
    "an unknown family": ("config.json", _set(model_type="gpt2")),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_all_others_are_left_to_transformers(fine_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(fine_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    file, change = _CHANGES[name]
    data = json.loads((folder / file).read_text(encoding="utf-8"))
    change(data)
    assert plain_tokenizer(folder) is not None
    (folder / file).write_text(json.dumps(data), encoding="utf-8")
    assert plain_tokenizer(folder) is None


_CHANGES_OF_QWEN3: Mapping[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "another class": ("tokenizer_config.json", _set(tokenizer_class="GPT2Tokenizer")),
    "a token that the class would choose": ("tokenizer_config.json", lambda data: data.pop("unk_token")),
    "spaces put in front": ("tokenizer_config.json", _set(add_prefix_space=True)),
    "special tokens read as text": ("tokenizer_config.json", _set(split_special_tokens=True)),
    "a special token that the file lacks": ("tokenizer_config.json", _set(additional_special_tokens=["<new>"])),
    "an added token that the file lacks": (
        "tokenizer_config.json",
        lambda data: data["added_tokens_decoder"].update({"9": {"content": "<new>", "special": True}}),
    ),
    "other expressions": (
        "tokenizer.json",
        lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"),
    ),
    "no normal form": ("tokenizer.json", _set(normalizer=None)),
    "words that need no merges": ("tokenizer.json", lambda data: data["model"].update(ignore_merges=True)),
    "added tokens in another order": ("tokenizer.json", lambda data: data["added_tokens"].reverse()),
}


@pytest.mark.parametrize("name", _CHANGES_OF_QWEN3)
def test_what_such_a_class_would_make_otherwise_is_left_to_transformers(qwen_folder: Path, name: str) -> None:
    file, change = _CHANGES_OF_QWEN3[name]
    data = json.loads((qwen_folder / file).read_text(encoding="utf-8"))
    change(data)
    assert plain_tokenizer(qwen_folder) is not None
    (qwen_folder / file).write_text(json.dumps(data), encoding="utf-8")
    assert plain_tokenizer(qwen_folder) is None


def test_files_that_transformers_reads_too_are_left_to_it(fine_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fine_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text("{}", encoding="utf-8")
        assert plain_tokenizer(folder) is None
        (folder / name).unlink()
    (folder / "tokenizer_config.json").unlink()
    assert plain_tokenizer(folder) is None


def test_the_families_with_a_class_of_their_own_are_those_of_transformers() -> None:
    general = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
    own = {
        model_type
        for model_type in supported_families()
        if model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        and TOKENIZER_MAPPING_NAMES.get(model_type) not in general
    }
    assert {name for name, family in supported_families().items() if family.has_own_tokenizer} == own

"""The files that hold the weights are those that transformers chooses; where there are none, a message says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

_INDEX = "model.safetensors.index.json"
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_NORM = "model.norm.weight"
_EARLY = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def single(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer in one file."""
    return toy_checkpoint(tmp_path, n_layers=1)


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same in two files, and an index."""
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {_FIRST: names[: len(names) // 2], _SECOND: names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, single / file, {"format": "pt"})
    _write_index(single, {name: file for file, part in halves.items() for name in part})
    return single


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
    return weight_map


def _names(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]


def test_one_file_comes_before_an_index_that_is_left_from_before(single: Path) -> None:
    names = load_file(single / "model.safetensors")
    _write_index(single, {name: f"model-0000{n % 3 + 1}-of-00003.safetensors" for n, name in enumerate(names)})
    checkpoint = Checkpoint(single)
    assert _names(checkpoint) == ["model.safetensors"]
    assert checkpoint.notes == (f"model.safetensors is read, as transformers does, and not {_INDEX} beside it",)


def test_a_tensor_that_one_file_lacks_makes_the_index_beside_it_suspect(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    del tensors[_NORM]
    save_file(tensors, single / "model.safetensors")
    _write_index(single, {_NORM: _FIRST})
    with pytest.raises(InputError, match=rf"{_NORM} is in none of the weight files; .*remove the one that is old"):
        Checkpoint(single)


def test_shards_without_an_index_are_read_if_all_are_there(sharded: Path) -> None:
    wanted = Checkpoint(sharded).tensor(Role.FINAL_NORM)
    (sharded / _INDEX).unlink()
    checkpoint = Checkpoint(sharded)
    assert _names(checkpoint) == [_FIRST, _SECOND]
    assert torch.equal(checkpoint.tensor(Role.FINAL_NORM), wanted)
    assert checkpoint.notes == (f"{_INDEX} is missing; all 2 shards are read",)


def test_some_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / _INDEX).unlink()
    (sharded / _SECOND).unlink()
    with pytest.raises(InputError, match=rf"{_INDEX} is missing, and only 1 of 2 shards are there: download the index"):
        Checkpoint(sharded)


def test_shards_of_two_saves_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / _INDEX).unlink()
    shutil.copyfile(sharded / _FIRST, sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(InputError, match="shards of several models"):
        Checkpoint(sharded)


def test_shards_without_an_index_and_without_a_tensor_are_refused(sharded: Path) -> None:
    (sharded / _INDEX).unlink()
    shutil.copyfile(sharded / _FIRST, sharded / _SECOND)
    with pytest.raises(InputError, match=rf"tensor .* is in none of the weight files; {_INDEX} is missing: down"):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / _SECOND).unlink()
    with pytest.raises(InputError, match=rf"the index names {_SECOND}, which is missing; download it again"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards_has_the_last_one_s_values_as_in_transformers(sharded: Path) -> None:
    tensors = load_file(sharded / _SECOND)
    name = next(name for name in load_file(sharded / _FIRST) if name == _EARLY)
    save_file(tensors | {name: torch.full((256,), 3.0, dtype=torch.bfloat16)}, sharded / _SECOND, {"format": "pt"})
    checkpoint = Checkpoint(sharded)
    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()[name]
    assert torch.equal(checkpoint.tensor(Role.ATTENTION_NORM, 0), theirs)
    assert checkpoint.notes == (f"tensor {name} is in 2 files; as in transformers the last counts, {_SECOND}",)


def test_an_index_that_names_another_shard_is_not_followed_as_in_transformers(sharded: Path) -> None:
    wanted = Checkpoint(sharded).tensor(Role.FINAL_NORM)
    _write_index(sharded, _weight_map(sharded) | {_NORM: _FIRST})
    checkpoint = Checkpoint(sharded)
    assert torch.equal(checkpoint.tensor(Role.FINAL_NORM), wanted)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(sharded).state_dict()[_NORM], wanted)
    (note,) = checkpoint.notes
    assert note.startswith(f"the index says that tensor {_NORM} lies in {_FIRST}; it is read from {_SECOND}")


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "/tmp/outside.safetensors",
        "sub/inside.safetensors",
        "..",
        "",
        "model.bin",
        "..\\outside.safetensors",
        "\n" * 5000,
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused_by_name(sharded: Path, place: str) -> None:
    """It is refused even where such a file is there."""
    for target in (sharded.parent / "outside.safetensors", sharded / "sub" / "inside.safetensors"):
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(sharded / _SECOND, target)
    _write_index(sharded, _weight_map(sharded) | {_NORM: place})
    with pytest.raises(InputError, match=rf"{_INDEX}: tensor {_NORM} is said to lie in ") as refused:
        Checkpoint(sharded)
    assert "in the checkpoint's own folder are read" in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(sharded))


@pytest.mark.parametrize("place", ["\0.safetensors", "x" * 5000 + ".safetensors"])
def test_a_name_that_no_file_can_have_is_missing(sharded: Path, place: str) -> None:
    _write_index(sharded, _weight_map(sharded) | {_NORM: place})
    with pytest.raises(InputError, match="which is missing") as refused:
        Checkpoint(sharded)
    assert len(str(refused.value)) < 300 + len(str(sharded))


def test_the_hub_s_cache_of_links_is_read(sharded: Path, tmp_path: Path) -> None:
    """In that cache a snapshot's files are links to ../../blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert _names(Checkpoint(snapshot)) == [_FIRST, _SECOND]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "may run code when it is opened"),
        ("pytorch_model-00001-of-00002.bin", "only safetensors checkpoints are read"),
        ("consolidated.00.pth", "another format"),
        ("consolidated.safetensors", "the trainer's own copy only"),
        ("model.fp16.safetensors", "a variant of the weights only"),
        ("model-Q4_K_M.gguf", "a GGUF file"),
        ("model.onnx", "an exported ONNX model"),
        ("model.safetensors.incomplete", "a download that is not complete"),
        ("adapter_model.safetensors", "merge it into its base model"),
        ("README.md", "neither model.safetensors nor"),
    ],
)
def test_what_is_there_in_place_of_weights_is_named(single: Path, name: str, said: str) -> None:
    (single / "model.safetensors").rename(single / name)
    with pytest.raises(InputError, match=rf"holds .*{said}"):
        Checkpoint(single)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 42\n", "run `git lfs pull`"),
        (bytes(1000), "begins with zeros"),
        (b"<!doctype html><html><body>Sign in</body></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_came_in_place_of_a_file_is_named(single: Path, name: str, content: bytes, said: str) -> None:
    (single / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is (truncated or not a safetensors file|not valid JSON) \(.*{said}"):
        Checkpoint(single)


def test_a_file_that_is_a_folder_is_named(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors is a folder"):
        Checkpoint(single)

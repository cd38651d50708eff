"""GGUF files that cannot be sources are refused in a sentence that names the file and what is wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.inspection import describe
from exporter.writing.gguf.metadata import source_ancestors, source_license
from exporter.writing.gguf.writer import write_gguf
from tests.gguf_copies import Typed, copy_gguf, split_gguf

_U32, _F32, _TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


@pytest.fixture(scope="module")
def file(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy = toy_checkpoint(folder, n_layers=1)
    (toy / "README.md").write_text("---\nlicense: other\nlicense_name: own\nbase_model: org/Base\n---\n")
    write_gguf(Student.teacher(open_source(toy)), "Q8_0", folder / "toy-Q8_0.gguf", name="toy", threads=1)
    return folder / "toy-Q8_0.gguf"


def _with_tensor(source: Path, target: Path, name: str) -> None:
    copy_gguf(source, target, {}, {name: (np.ones(32, dtype=np.float32), GGMLQuantizationType.F32)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": ("grok", _TEXT)}, "architecture grok has no experts here|architecture grok cannot"),
        ({"general.architecture": ("llama", _TEXT)}, "architecture llama has no experts here"),
        ({"qwen3moe.embedding_length": None}, r"has no qwen3moe\.embedding_length: the model cannot be read without"),
        ({"qwen3moe.block_count": ("1", _TEXT)}, r"qwen3moe\.block_count must be a whole number"),
        ({"qwen3moe.block_count": (0, _U32)}, "its metadata, as settings of a config.json, are wrong: num_hidden_lay"),
        ({"qwen3moe.expert_count": (16, _U32)}, r"tensor blk\.0\.ffn_gate_inp\.weight has shape \[32, 256\]"),
        ({"qwen3moe.expert_gating_func": (2, _U32)}, "cannot be turned back into a Qwen3MoeFor.*: expert_gating_func"),
        ({"qwen3moe.attention.sliding_window": (7, _U32)}, "cannot be turned back .*: attention.sliding_window: 7"),
        ({"qwen3moe.new_setting": (1.5, _F32)}, "new_setting: 1.5 in the file, and the model has no such setting"),
        ({"qwen3moe.rope.scaling.type": ("longrope", _TEXT)}, "rope.scaling.type is 'longrope', which cannot be turn"),
        ({"tokenizer.ggml.model": ("t5", _TEXT)}, "its tokenizer is of the kind t5; only gpt2 and llama can"),
        ({"tokenizer.ggml.pre": ("superbpe", _TEXT)}, "llama.cpp's pre-tokenizer superbpe is not known here"),
        ({"tokenizer.ggml.tokens": None}, "has no tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be pairs of texts"),
    ],
)
def test_what_cannot_be_turned_back_is_named(
    file: Path, tmp_path: Path, changes: dict[str, Typed | None], said: str
) -> None:
    copy_gguf(file, tmp_path / "changed.gguf", changes)
    with pytest.raises(InputError, match=rf"changed\.gguf.*({said})"):
        GgufSource(tmp_path / "changed.gguf")


def test_a_tensor_that_nothing_claims_is_refused(file: Path, tmp_path: Path) -> None:
    _with_tensor(file, tmp_path / "more.gguf", "blk.0.ffn_gate_shexp.weight")
    with pytest.raises(UnsupportedError, match=r"more\.gguf: tensor blk\.0\.ffn_gate_shexp\.weight belongs to no part"):
        GgufSource(tmp_path / "more.gguf")


def test_factors_of_the_rotary_embedding_are_not_read_past(file: Path, tmp_path: Path) -> None:
    _with_tensor(file, tmp_path / "more.gguf", "rope_freqs.weight")
    with pytest.raises(UnsupportedError, match=r"factors of the rotary embedding in rope_freqs\.weight are not those"):
        GgufSource(tmp_path / "more.gguf")


def test_a_damaged_file_and_a_later_part_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(InputError, match=r"short\.gguf is truncated"):
        GgufSource(tmp_path / "short.gguf")
    parts = split_gguf(file, tmp_path / "big", 2)
    with pytest.raises(InputError, match="split into 2, and not the first"):
        GgufSource(parts[1])
    parts[1].unlink()
    with pytest.raises(InputError, match="00002-of-00002"):
        GgufSource(parts[0])


def test_it_is_described(file: Path) -> None:
    found: dict[str, Any] = describe(file)
    assert (found["dtype"], found["stored_as"], found["notes"]) == ("float32", "blocks of Q8_0", [])
    assert found["identity"] == GgufSource(file).identity()


def test_licence_and_ancestors_are_those_of_its_metadata(file: Path) -> None:
    source = GgufSource(file)
    assert (source_license(source)["license"], source_ancestors(source)) == ("other", ["org/Base"])


def test_keys_for_people_that_are_not_carried_over_are_said(file: Path, tmp_path: Path) -> None:
    copy_gguf(file, tmp_path / "x.gguf", {"general.author": ("somebody", _TEXT), "quantize.imatrix.file": ("i", _TEXT)})
    (note,) = GgufSource(tmp_path / "x.gguf").notes
    assert note == "metadata that new files do not have: general.author, quantize.imatrix.file"


def test_the_dtype_is_the_smallest_that_holds_all_values(file: Path, tmp_path: Path) -> None:
    source = GgufSource(file)
    for mix, dtype in (("BF16", "bfloat16"), ("F16", "float16"), ("Q4_0", "float32")):
        write_gguf(Student.teacher(source), mix, tmp_path / f"{mix}.gguf", name="toy", threads=1)
        assert str(GgufSource(tmp_path / f"{mix}.gguf").dtype) == f"torch.{dtype}"


def test_a_place_that_cannot_be_written_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"moe-export-{os.getuid()}"
    own.touch()
    with pytest.raises(InputError, match=rf"{own}: .* cannot be put there .* in TMPDIR"):
        GgufSource(file)
    own.unlink()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"is no folder of yours; name another place"):
        GgufSource(file)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damaged_small_files_are_made_again(file: Path, tmp_path: Path) -> None:
    copy_gguf(file, tmp_path / "own.gguf", {"general.author": ("else", _TEXT)})
    folder = GgufSource(tmp_path / "own.gguf").tokenizer_folder
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:100])
    os.unlink(folder / "config.json")
    assert GgufSource(tmp_path / "own.gguf").spec.n_experts == 32
    assert (folder / "tokenizer.json").read_bytes() == whole
    assert GGMLQuantizationType.Q8_0 in GgufSource(tmp_path / "own.gguf").stored_types(
        next(tensor.role for tensor in GgufSource(file).spec.layers[0].expert_tensors), 0
    )

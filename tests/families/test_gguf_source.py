"""A GGUF file of every family, read back as a source."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from compressors.model.config.config_check import check_against_transformers
from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from tests.families.conftest import logits_of
from tests.families.rows import Row
from tests.gguf_copies import copy_gguf

_READ_AS = {"glm4_moe_lite": "deepseek_v3"}
"""Families whose files say nothing that tells them from another, which computes the same."""


@pytest.fixture(scope="module")
def written(folder: Path, row: Row, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "gguf" not in row.formats:
        pytest.skip("the family has no GGUF files")
    path = tmp_path_factory.mktemp("gguf") / f"{folder.name}-F32.gguf"
    write_gguf(Student.teacher(Checkpoint(folder)), "F32", path, name="toy", threads=1)
    return path


@pytest.fixture(scope="module")
def original(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint as its family has it: no file says whether YaRN truncates, which gpt-oss's checkpoints do not."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.get("rope_scaling") or {}
    if "truncate" not in scaling:
        return Checkpoint(folder)
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("original") / folder.name))
    scaling["truncate"] = False
    (copy / "config.json").write_text(json.dumps(config))
    return Checkpoint(copy)


def test_its_description_is_the_original_s(original: Checkpoint, written: Path) -> None:
    source, wanted = GgufSource(written), original.family.model_type
    assert source.family.model_type == _READ_AS.get(wanted, wanted)
    layers = []
    for found, layer in zip(source.spec.layers, original.spec.layers, strict=True):
        if found.mixer.rope is not None and layer.mixer.rope is not None:
            theta = layer.mixer.rope.theta  # files hold it in float32
            assert found.mixer.rope.theta == pytest.approx(theta, rel=1e-7)
            found = replace(found, mixer=replace(found.mixer, rope=replace(found.mixer.rope, theta=theta)))
        layers.append(found)
    tokens = {"pad_token_id": original.spec.pad_token_id}  # the tokenizer names one that config.json does not
    assert replace(source.spec, family=original.family, layers=tuple(layers), **tokens) == original.spec
    check_against_transformers(source.config, source.config_path, source.spec)


def _assert_same_file(path: Path, original: Path) -> None:
    found, wanted = GGUFReader(path), GGUFReader(original)
    assert bytes(found.data[: found.data_offset]) == bytes(wanted.data[: wanted.data_offset])
    for tensor, other in zip(found.tensors, wanted.tensors, strict=True):
        if tensor.name.endswith("ssm_a"):  # a logarithm is taken and undone, which costs a last bit
            np.testing.assert_allclose(tensor.data, other.data, rtol=2e-7)
        else:
            assert tensor.data.tobytes() == other.data.tobytes(), tensor.name


def test_it_is_written_again_byte_for_byte(written: Path, tmp_path: Path) -> None:
    source = GgufSource(written)
    write_gguf(Student.teacher(source), "F32", tmp_path / "again.gguf", name="toy", threads=1)
    _assert_same_file(tmp_path / "again.gguf", written)


@torch.no_grad()
def test_pruned_it_computes_what_the_pruned_original_does(
    original: Checkpoint, written: Path, blocks_BT: torch.Tensor
) -> None:
    found = []
    for source in (original, GgufSource(written)):
        kept = [(0, 2, 3, 5, 6, 7) if layer.routed is not None else () for layer in source.spec.layers]
        student = Student(source, ExpertMap.keeping(source.spec.n_experts, kept))
        found.append(logits_of(StreamedModel(student), blocks_BT))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_onnx_is_made_of_it_as_of_the_original(original: Checkpoint, written: Path, row: Row, tmp_path: Path) -> None:
    if "onnx" not in row.formats:
        pytest.skip("the family has no ONNX files")
    for name, source in (("original", original), ("file", GgufSource(written))):
        write_onnx(Student.teacher(source), "F32", tmp_path / name, threads=1)
    wanted, found = (
        np.frombuffer((tmp_path / name / "model.onnx.data").read_bytes(), dtype=np.float32)
        for name in ("original", "file")
    )
    # a norm's 1 that is added and taken away again, and a base in float32, cost a last bit
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_keys_may_be_missing_where_llama_cpp_takes_the_same_values(written: Path, tmp_path: Path) -> None:
    """As in files of llama.cpp's converter."""
    source, file = GgufSource(written), GgufFile(written)
    architecture = source.family.gguf.architecture
    absent = {f"{architecture}.{key}": value for key, value in source.family.gguf.absent(source.spec).items()}
    missing = [key for key, value in absent.items() if key in file.metadata and file.metadata[key] == value]
    if architecture in ("afmoe", "dots1", "glm4moe"):
        assert missing
    copy_gguf(written, tmp_path / "x.gguf", dict.fromkeys(missing))
    assert GgufSource(tmp_path / "x.gguf").spec == source.spec


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"], indirect=True)
def test_layers_for_several_tokens_at_once_are_read_past(written: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter writes them: behind the last layer, and counted among all."""
    whole, file = GgufSource(written), GgufFile(written)
    n_layers, behind = whole.spec.n_layers, f"blk.{whole.spec.n_layers}."
    more = {
        tensor.name.replace(f"blk.{n_layers - 1}.", behind): (tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(written).tensors
        if tensor.name.startswith(f"blk.{n_layers - 1}.")
    }
    more[f"{behind}nextn.eh_proj.weight"] = (np.ones((64, 128), dtype=np.float32), GGMLQuantizationType.F32)
    architecture, path = whole.family.gguf.architecture, tmp_path / "mtp.gguf"
    counts = {f"{architecture}.block_count": n_layers + 1, f"{architecture}.nextn_predict_layers": 1}
    changes: dict[str, Any] = {key: (count, GGUFValueType.UINT32) for key, count in counts.items()}
    if (kinds := file.metadata.get(f"{architecture}.attention.recurrent_layers")) is not None:
        items = [*kinds, False], GGUFValueType.ARRAY, GGUFValueType.BOOL
        changes[f"{architecture}.attention.recurrent_layers"] = items
    copy_gguf(written, path, changes, more)
    source = GgufSource(path)
    assert source.spec == whole.spec
    assert source.parts_read_past == {"layers for predicting several tokens at once (MTP)": len(more)}
    assert source.n_bytes == whole.n_bytes
    write_gguf(Student.teacher(source), "F32", tmp_path / "again.gguf", name="toy", threads=1)
    _assert_same_file(tmp_path / "again.gguf", written)
    copy_gguf(written, path, {}, more)
    with pytest.raises(UnsupportedError, match=rf"tensor {behind}\w+.weight belongs to no part"):
        GgufSource(path)

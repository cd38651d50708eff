"""Metadata: identity, licence, ancestry and hyper-parameters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from exporter.writing.gguf.container import TensorEntry, render_header, render_values
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.metadata import gguf_file_name, model_metadata, moe_size_label, source_license
from tests.described_folder import DescribedFolder


@pytest.fixture
def folder(fine_folder: Path, tmp_path: Path) -> Path:
    """A folder as in the hub's cache."""
    folder = tmp_path / "models--ours--Fine-32x3M" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    shutil.copyfile(fine_folder / "config.json", folder / "config.json")
    return folder


def _read(folder: Path, name: str = "org/Fine-Instruct-v1.1", preset: str = "Q4_K") -> dict[str, Any]:
    metadata = model_metadata(read_spec(folder), DescribedFolder(folder), name, preset)
    path = folder / "m.gguf"
    path.write_bytes(render_header(len(metadata), render_values(metadata), []))
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def test_identity_and_hyper_parameters(folder: Path) -> None:
    metadata = _read(folder)
    expected = {
        "general.architecture": "qwen3moe",
        "general.name": "org/Fine-Instruct-v1.1",
        "general.organization": "org",
        "general.basename": "Fine",
        "general.finetune": "Instruct",
        "general.version": "v1.1",
        "general.size_label": "32x2.9M",
        "general.quantized_by": "moe-export",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_K_M,
        "general.quantization_version": 2,
        "general.base_model.count": 1,
        "general.base_model.0.name": "Fine-32x3M",
        "general.base_model.0.repo_url": "https://huggingface.co/ours/Fine-32x3M",
        "qwen3moe.block_count": 6,
        "qwen3moe.context_length": 2048,
        "qwen3moe.embedding_length": 256,
        "qwen3moe.expert_feed_forward_length": 128,
        "qwen3moe.attention.head_count": 8,
        "qwen3moe.attention.head_count_kv": 4,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.rope.dimension_count": 32,
        "qwen3moe.expert_count": 32,
        "qwen3moe.expert_used_count": 4,
        "qwen3moe.vocab_size": 4096,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("model", "key", "width"),
    [
        ("fine", "qwen3moe.expert_feed_forward_length", 128),
        ("coarse", "llama.feed_forward_length", 512),
        ("olmoe", "olmoe.feed_forward_length", 64),
    ],
)
def test_the_expert_width_is_where_llama_cpp_looks(
    model: str, key: str, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copyfile(request.getfixturevalue(f"{model}_folder") / "config.json", tmp_path / "config.json")
    metadata = _read(tmp_path)
    widths = {name: value for name, value in metadata.items() if name.endswith("feed_forward_length")}
    assert widths == {key: width}


def test_licence_travels_with_the_model(folder: Path) -> None:
    card = "---\nlicense: other\nlicense_name: nvidia-open\nlicense_link: LICENSE\nbase_model: a/b\n---\n# Text\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    metadata = _read(folder)
    assert metadata["general.license"] == "other"
    assert metadata["general.license.name"] == "nvidia-open"
    assert metadata["general.license.link"] == "LICENSE"


def test_outside_the_hub_cache_the_card_names_the_ancestor(fine_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(fine_folder / "config.json", tmp_path / "config.json")
    (tmp_path / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen3-30B-A3B\n---\n", encoding="utf-8")
    metadata = _read(tmp_path)
    assert metadata["general.base_model.0.organization"] == "Qwen"
    (tmp_path / "README.md").unlink()
    assert "general.base_model.count" not in _read(tmp_path)


@pytest.mark.parametrize(
    "card",
    [
        "license: {a: b}\nbase_model: [[1], null, {}]",
        "license: 2026-01-01\nbase_model: 2026-01-01",
        'license: "\\ud800"\nbase_model: ["\\ud800", a/b]',
        "- a list",
        "base_model: &a [*a, *a]",
        "",
    ],
)
def test_what_a_card_has_no_place_for_is_left_out(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    assert not any(source_license(DescribedFolder(folder)).values())
    assert _read(folder)["general.base_model.0.name"] == "Fine-32x3M"


def test_a_card_without_bounds_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {'[' * 100_000}\n---\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md: the block between the --- lines is not YAML"):
        source_license(DescribedFolder(folder))
    os.truncate(folder / "README.md", 10**12)
    with pytest.raises(InputError, match=r"README\.md has 1,000,000,000,000 bytes"):
        source_license(DescribedFolder(folder))


def test_a_damaged_card_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [a\n---\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md"):
        _read(folder)


@pytest.mark.parametrize("n_experts", [1, 7, 32])
def test_size_label_is_gguf_pys(family_folder: Path, n_experts: int) -> None:
    spec = read_spec(family_folder).with_experts(n_experts)
    writer = gguf.GGUFWriter(None, spec.family.gguf.architecture)
    for tensor in plan_tensors(spec, "F32"):
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.n_bytes, raw_dtype=tensor.ggml_type)
    assert moe_size_label(spec) == gguf.size_label(*writer.get_total_parameter_count())


def test_file_name_follows_the_convention(fine_folder: Path) -> None:
    spec: ModelSpec = read_spec(fine_folder).with_experts(24)
    size = moe_size_label(spec)
    assert gguf_file_name("org/My Model", spec, "Q4_K") == f"My-Model-{size}-Q4_K_M.gguf"  # llama-quantize's alias
    types = {"blk.0.attn_v.weight": "Q8_0"}
    assert gguf_file_name("x", spec, "IQ2_M", types) == f"x-{size}-Q3_MIX.gguf"


def test_container_is_what_gguf_py_reads(tmp_path: Path) -> None:
    types = gguf.GGMLQuantizationType
    entries = [TensorEntry("a", (2, 3), types.F32, 24), TensorEntry("b", (4, 2, 64), types.Q8_0, 4 * 2 * 68)]
    header = render_header(0, b"", entries)
    assert len(header) % 32 == 0
    (tmp_path / "x.gguf").write_bytes(header + bytes(32 + 4 * 2 * 68))
    first, second = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert (first.name, first.shape.tolist(), first.data_offset) == ("a", [3, 2], len(header))
    assert (second.name, second.shape.tolist(), second.data_offset) == ("b", [64, 2, 4], len(header) + 32)

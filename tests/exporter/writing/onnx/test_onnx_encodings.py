"""Encodings of ONNX weights: each mix of them is computed with exactly, read back, sized beforehand, or refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.integer_blocks import BlockType
from compressors.model.files.onnx_names import DATA_FILE, MODEL_FILE
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import GGMLQuantizationType
from compressors.quantize.blocks import search_blocks
from exporter.writing.onnx.encodings import ENCODINGS, onnx_units
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.altered import altered
from validate.files.file_facts import onnx_facts
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.weight_comparison import Damage, Unit, compare_weights
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

Tokens = npt.NDArray[np.int64]

_EXACT = 1e-3  # logits reach 17
_INT8 = 1.5  # products quantize their inputs, and a router near a tie picks another expert
_MIXES: Mapping[str, Mapping[str, str]] = {
    "4 bits in all blocks": {
        "embedding": "F32",
        "layers.0.experts": "4@128",
        "layers.0.q_proj": "4@64",
        "layers.0.k_proj": "4@32",
        "layers.0.v_proj": "4@16",
        "layers.0.o_proj": "F32",
        "layers.1.experts": "4@16",
    },
    "all widths": {
        "embedding": "8@128",
        "layers.0.experts": "8@64",
        "layers.0.q_proj": "8@128",
        "layers.0.k_proj": "2@64",
        "layers.1.experts": "2@128",
        "layers.1.o_proj": "8@16",
        "layers.1.v_proj": "Q8_0",
    },
    "an embedding of 2 bits": {"embedding": "2@32", "layers.1.experts": "F32"},
}


@pytest.fixture(scope="module", params=["fine", "coarse"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Student:
    """Two layers of each trained model, with five experts in each."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model=request.param)
    source = Checkpoint(folder)
    return Student(source, ExpertMap.keeping(source.spec.n_experts, ((5, 0, 3, 1, 7), (2, 4, 6, 0, 1))))


@pytest.fixture(scope="module", params=sorted(_MIXES))
def mix(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """Encodings of some units; the others have those of the preset Q4_0."""
    return _MIXES[request.param]


@pytest.fixture(scope="module")
def folder(student: Student, mix: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student in that mix."""
    path = tmp_path_factory.mktemp("onnx")
    write_onnx(student, "Q4_0", path, encodings=mix, importance=_importance(student), threads=1)
    return path


def _importance(student: Student) -> dict[tuple[Role, int | None], torch.Tensor]:
    spec, generator = student.spec, torch.Generator().manual_seed(0)
    lengths = {Role.EXPERT_GATE: spec.hidden_size, Role.EXPERT_DOWN: spec.expert_width}
    return {
        (role, layer): torch.rand(spec.n_experts, length, generator=generator) ** 4 + 1e-3
        for role, length in lengths.items()
        for layer in range(spec.n_layers)
    }


def _logits(backend: OnnxRuntimeBackend | TorchBackend, tokens: Tokens) -> npt.NDArray[np.float32]:
    (output,) = backend.run(tokens[None])
    return output.logits_SV


def test_the_runtime_computes_with_the_numbers_that_are_read_back(
    student: Student, mix: Mapping[str, str], folder: Path, heldout_tokens: Tokens
) -> None:
    tokens = heldout_tokens[:256]
    written = student.as_written(OnnxWeights(folder, student.spec))
    expected = _logits(TorchBackend(written), tokens)
    found = _logits(OnnxRuntimeBackend(folder, threads=1), tokens)
    assert np.abs(found - expected).max() < _INT8
    distance = np.abs(_logits(TorchBackend(student), tokens) - expected).mean()
    assert np.abs(found - expected).mean() < 0.15 * distance


def test_float32_inputs_are_exact_at_4_bits(student: Student, tmp_path: Path, heldout_tokens: Tokens) -> None:
    mix, tokens = _MIXES["4 bits in all blocks"], heldout_tokens[:256]
    write_onnx(student, "Q4_0", tmp_path, encodings=mix, inputs="float32", threads=1)
    expected = _logits(TorchBackend(student.as_written(OnnxWeights(tmp_path, student.spec))), tokens)
    found = _logits(OnnxRuntimeBackend(tmp_path, threads=1), tokens)
    assert np.abs(found - expected).max() < _EXACT
    assert graph_setting_symptoms(tmp_path / MODEL_FILE, student.spec) == []
    n_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert n_bytes == predict_size(student.spec, "Q4_0", mix)


def _weight_damage(student: Student, folder: Path) -> tuple[Damage, ...]:
    weights = OnnxWeights(folder, student.spec)
    return compare_weights(student, student.as_written(weights), weights.stored_type).damage


def test_validation_finds_nothing_wrong(student: Student, folder: Path) -> None:
    assert graph_setting_symptoms(folder / MODEL_FILE, student.spec) == []
    assert _weight_damage(student, folder) == ()


def test_bits_are_the_mean_over_layers(student: Student, tmp_path: Path) -> None:
    encodings = {"layers.0.experts": "4@128", "layers.1.experts": "2@32"}
    write_onnx(student, "F32", tmp_path, encodings=encodings, threads=1)
    assert onnx_facts(tmp_path / MODEL_FILE).bits_per_weight == pytest.approx((4 + 16 / 128 + 2 + 16 / 32) / 2)
    write_onnx(student, "F32", tmp_path, encodings={"layers.0.experts": "8@64"}, threads=1)
    assert onnx_facts(tmp_path / MODEL_FILE).bits_per_weight == pytest.approx((8.25 + 32) / 2)


def test_validation_finds_wrong_attributes(student: Student, folder: Path, tmp_path: Path) -> None:
    """The bits, the block size and a product's sizes of each node that computes with codes."""
    (tmp_path / DATA_FILE).symlink_to(folder / DATA_FILE)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    n_changed = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("bits", "expert_weight_bits", "block_size", "N", "K"):
                right, attribute.i = attribute.i, attribute.i * 2
                (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
                found = graph_setting_symptoms(tmp_path / MODEL_FILE, student.spec)
                assert any(node.op_type in line for line in found), (node.name, attribute.name)
                attribute.i = right
                n_changed += 1
    assert n_changed >= 2 * 2 + 4


@pytest.mark.parametrize("damage", ["codes of another row", "scales too large", "no scales"])
def test_validation_finds_damaged_experts(
    student: Student, mix: Mapping[str, str], folder: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(folder, tmp_path / "onnx")
    weight = plan_tensors(student.spec, "Q4_0", mix).weight(Role.EXPERT_DOWN, 0)
    assert weight.scales is not None
    tensor = weight.codes if damage == "codes of another row" else weight.scales
    data = np.memmap(tmp_path / "onnx" / DATA_FILE, np.dtype(tensor.dtype), "r+", tensor.offset, tensor.shape)
    if damage == "codes of another row":
        data[2, 17] = data[2, 18].copy()
    elif damage == "scales too large":
        data[2] *= np.float16(1.25)
    else:
        data[2, 17] = 0
    data.flush()
    (found,) = _weight_damage(student, tmp_path / "onnx")
    row = None if damage == "scales too large" else 17
    assert found.unit == Unit(Role.EXPERT_DOWN, 0, 2, row)


def test_codes_are_those_of_the_search(student: Student, mix: Mapping[str, str], folder: Path) -> None:
    """Gate and up rows alternate, and every expert has its own importance."""
    weights, importance = OnnxWeights(folder, student.spec), _importance(student)
    for layer in range(student.spec.n_layers):
        encoding = ENCODINGS[mix[f"layers.{layer}.experts"]] if f"layers.{layer}.experts" in mix else None
        if encoding is None or encoding.blocks is None:
            continue
        assert weights.stored_type(Role.EXPERT_UP, layer) == encoding.blocks
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            values, weighing = student.expert(role, layer, 3), importance.get((role, layer))
            blocks = search_blocks(
                values, *_numbers(encoding.blocks), None if weighing is None else weighing[3], name=""
            )
            found = torch.empty(values.shape)
            weights.read_expert(role, layer, 3, found)
            np.testing.assert_array_equal(found.numpy(), blocks.values())


def _numbers(blocks: BlockType) -> tuple[int, int]:
    return blocks.bits, blocks.block_size


def test_size_is_predicted_to_the_byte(student: Student, mix: Mapping[str, str], folder: Path) -> None:
    written = sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))
    assert predict_size(student.spec, "Q4_0", mix) == written
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)


def test_bytes_do_not_depend_on_threads(student: Student, mix: Mapping[str, str], folder: Path, tmp_path: Path) -> None:
    importance = _importance(student)
    write_onnx(student, "Q4_0", tmp_path, encodings=mix, importance=importance, threads=2)
    for name in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_units_hold_every_quantized_weight(student: Student) -> None:
    """The bytes of a unit are those of its tensors in the data file."""
    spec = student.spec
    units = {unit.name: unit for unit in onnx_units(spec)}
    assert len(units) == 1 + 5 * spec.n_layers
    for encoding in ("4@128", "2@32", "8@16", "Q8_0", "F32"):
        layout = plan_tensors(spec, "Q4_0", dict.fromkeys(units, encoding))
        placed = {tensor.name: tensor.n_bytes for tensor in layout.tensors}
        of_units = sum(unit.encodings[encoding] for unit in units.values())
        others = sum(n_bytes for name, n_bytes in placed.items() if _is_of_no_unit(name))
        assert of_units + others == sum(placed.values())
        assert layout.data_bytes - sum(placed.values()) < 4096 * len(placed)


def _is_of_no_unit(name: str) -> bool:
    return "norm" in name or "rotary" in name or name.endswith("gate.weight")


def test_a_head_of_its_own_is_a_unit(student: Student) -> None:
    spec = replace(student.spec, tied_embeddings=False)
    units = {unit.name for unit in onnx_units(spec)}
    assert {"embedding", "head"} <= units
    layout = plan_tensors(spec, "Q4_0", {"embedding": "2@128", "head": "8@64"})
    encodings = [layout.weight(role).encoding.name for role in (Role.TOKEN_EMBEDDING, Role.HEAD)]
    assert encodings == ["2@128", "8@64"]
    with pytest.raises(InputError, match="'head' is no unit"):
        plan_tensors(student.spec, "Q4_0", {"head": "8@64"})


def test_dense_models_have_units_too(student: Student, tmp_path: Path, heldout_tokens: Tokens) -> None:
    dense = Student(student.source, ExpertMap.keeping(student.source.spec.n_experts, [[3], [5]]))
    encodings = {"layers.0.experts": "2@128", "layers.1.experts": "8@32"}
    write_onnx(dense, "Q4_0", tmp_path, encodings=encodings, threads=1)
    weights = OnnxWeights(tmp_path, dense.spec)
    assert weights.stored_type(Role.EXPERT_UP, 0) == BlockType(2, 128)
    assert weights.stored_type(Role.EXPERT_DOWN, 1) == GGMLQuantizationType.Q8_0
    expected = _logits(TorchBackend(dense.as_written(weights)), heldout_tokens[:64])
    assert np.abs(_logits(OnnxRuntimeBackend(tmp_path, threads=1), heldout_tokens[:64]) - expected).max() < _INT8


def _shape_of_rows(spec: ModelSpec, expert_width: int) -> ModelSpec:
    return altered(spec, expert_width=expert_width)


def test_wrong_choices_are_refused_by_name(student: Student) -> None:
    spec = student.spec
    with pytest.raises(InputError, match=r"'4@256' is not an encoding.*4@128.*Q8_0"):
        predict_size(spec, "Q4_0", {"embedding": "4@256"})
    with pytest.raises(InputError, match=r"'2@16' is not an encoding"):
        predict_size(spec, "Q4_0", {"embedding": "2@16"})
    with pytest.raises(InputError, match=r"'layers.2.experts' is no unit.*layers.0 to layers.1.*experts"):
        predict_size(spec, "Q4_0", {"layers.2.experts": "4@128"})
    narrow = _shape_of_rows(spec, 96)
    with pytest.raises(UnsupportedError, match=r"layers.1.experts.*rows of 96 values.*blocks of 4@128.*4@32"):
        predict_size(narrow, "Q4_0", {"layers.1.experts": "4@128"})
    (experts,) = (unit for unit in onnx_units(narrow) if unit.name == "layers.1.experts")
    assert {"4@32", "2@32", "8@16", "Q4_0", "F32"} <= set(experts.encodings)
    assert not any(name.endswith(("@64", "@128")) for name in experts.encodings)
    n_values = 3 * spec.n_experts * 96 * spec.hidden_size
    assert experts.encodings["4@32"] == n_values // 2 + n_values // 32 * 2
    assert math.isclose(experts.encodings["F32"], 4 * n_values)

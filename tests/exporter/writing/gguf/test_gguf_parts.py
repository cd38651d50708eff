"""A model whose tensors GGUF files hold in parts, other orders and other shapes, with a dense layer before the others.

No runtime knows it: it is a trained model with a special description. It is written, read, compared, tuned and saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressors.calibration.statistics import Importance
from compressors.model.description.feed_forward import Dense
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Fused, GgufTensor, TensorSpec
from compressors.model.description.transforms import (
    EverySecond,
    HeadMatrices,
    InterleaveRotary,
    PlusOne,
    TiledHeads,
    Transform,
)
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.shared.parts import dense_tensors
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize.kernels import quantize_rows
from exporter.writing.gguf.container import TensorEntry, aligned, render_header, render_values, string
from exporter.writing.gguf.imatrix import read_imatrix
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.type_table import plan_gguf_units
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.tuning import keep_values, rewrite
from validate.files.weight_comparison import Fault, compare_weights

_TILED = TiledHeads("k", "H", "h", of_inputs=True)
_PARTS: Mapping[Role, tuple[tuple[str, Transform], ...]] = {
    Role.ATTENTION_NORM: (("attn_norm.weight", PlusOne()),),
    Role.QUERY: (("attn_k_b.weight", HeadMatrices("H", ("h",), 0, is_transposed=True)),),
    Role.KEY: (("attn_k.weight", InterleaveRotary()),),
    Role.VALUE: (("attn_even.weight", EverySecond(0, axis=0)), ("attn_odd.weight", EverySecond(1, axis=0))),
    Role.ATTENTION_OUTPUT: (("ssm_out.weight", _TILED),),
    Role.EXPERT_GATE: (
        ("ffn_gate_exps.weight", EverySecond(0, axis=0)),
        ("ffn_more_exps.weight", EverySecond(1, axis=0)),
    ),
}


@dataclass(frozen=True)
class _Attention(GroupedQuery):
    """The same with a letter for the key heads."""

    @property
    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes, "k": self.n_kv_heads}


def _in_parts(tensor: TensorSpec) -> TensorSpec:
    if tensor.role not in _PARTS or (tensor.role.is_expert and not tensor.is_per_expert):
        return tensor
    first, *rest = (GgufTensor(f"blk.{{layer}}.{name}", transform) for name, transform in _PARTS[tensor.role])
    return replace(tensor, gguf=first, gguf_rest=tuple(rest))


def _layer(layer: LayerSpec) -> LayerSpec:
    mixer = _Attention(**{name: getattr(layer.mixer, name) for name in (field.name for field in fields(layer.mixer))})
    return replace(layer, mixer=mixer, tensors=tuple(map(_in_parts, layer.tensors)))


def _dense(layer: LayerSpec) -> LayerSpec:
    kept = tuple(tensor for tensor in layer.shared_tensors if tensor.role is not Role.ROUTER)
    return replace(layer, feed_forward=Dense(layer.expert_width), tensors=(*kept, *dense_tensors()))


@pytest.fixture(scope="module")
def student(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Three layers, of which the first is dense; five experts in the others."""
    checkpoint = copy.copy(Checkpoint(toy_checkpoint(tmp_path_factory.mktemp("parts"), n_layers=3)))
    first, *others = map(_layer, checkpoint.spec.layers)
    experts = "model.layers.0.mlp.experts.7."
    for part in ("gate", "up", "down"):
        checkpoint.headers[f"model.layers.0.mlp.{part}_proj.weight"] = checkpoint.headers[
            f"{experts}{part}_proj.weight"
        ]
    checkpoint.spec = replace(checkpoint.spec, layers=(_dense(first), *others))
    return Student(checkpoint, ExpertMap.keeping(32, [(), (4, 0, 9, 31, 2), (1, 2, 3, 4, 5)]))


def _importance(spec: ModelSpec) -> Importance:
    random = torch.Generator().manual_seed(0)
    return {
        (tensor.role, layer): torch.rand(
            *([spec.layers[layer].n_experts] if tensor.is_per_expert else []),
            spec.dimensions(tensor.role, layer)[-1],
            generator=random,
        )
        for tensor, layer in spec.places
        if tensor.is_quantizable and layer is not None
    }


def _written(student: Student, folder: Path, mix: str) -> Path:
    path = folder / f"{mix}.gguf"
    write_gguf(student, mix, path, importance=_importance(student.spec), name="x", threads=2)
    assert path.stat().st_size == predict_file_size(student.spec, student.source, mix, "x")
    return path


def test_every_tensor_comes_back(student: Student, tmp_path: Path) -> None:
    path = _written(student, tmp_path, "F32")
    shapes = {name: entry.shape for name, entry in GgufFile(path).tensors.items()}
    assert shapes["blk.1.attn_k_b.weight"] == (8, 256, 32)
    assert shapes["blk.2.attn_even.weight"] == shapes["blk.2.attn_odd.weight"] == (64, 256)
    assert shapes["blk.1.ffn_gate_exps.weight"] == shapes["blk.1.ffn_more_exps.weight"] == (5, 64, 256)
    assert shapes["blk.0.ffn_gate.weight"] == (128, 256)
    assert "blk.0.ffn_gate_inp.weight" not in shapes
    found = student.as_written(GgufWeights(path, student.spec))
    for tensor, layer in student.spec.written.places:
        if tensor.is_per_expert and layer is not None:
            for expert in range(5):
                values = student.expert(tensor.role, layer, expert).float()
                assert torch.equal(found.expert(tensor.role, layer, expert), values), tensor.role
        else:
            values = student.tensor(tensor.role, layer).float()
            exact = {} if tensor.role is not Role.ATTENTION_NORM else {"atol": 1e-6, "rtol": 0}
            torch.testing.assert_close(found.tensor(tensor.role, layer), values, **({"atol": 0, "rtol": 0} | exact))
            assert torch.equal(found.rows(tensor.role, layer, slice(1, 5)), found.tensor(tensor.role, layer)[1:5])


def test_rows_are_quantized_along_their_own_inputs(student: Student, tmp_path: Path) -> None:
    importance = _importance(student.spec)
    file = GgufFile(_written(student, tmp_path, "IQ4_NL"))
    tiled = torch.arange(256).reshape(4, 2, 32).transpose(0, 1).flatten()
    output, weights = student.tensor(Role.ATTENTION_OUTPUT, 1)[:, tiled], importance[Role.ATTENTION_OUTPUT, 1][tiled]
    query, no_weights = student.tensor(Role.QUERY, 1).view(8, 32, 256).transpose(1, 2).reshape(-1, 32), None
    gate, of_expert = student.expert(Role.EXPERT_GATE, 1, 3)[1::2], importance[Role.EXPERT_GATE, 1][3]
    for name, first, values, inputs in (
        ("ssm_out", 0, output, weights),
        ("attn_k_b", 0, query, no_weights),
        ("ffn_more_exps", 3 * 64, gate, of_expert),
    ):
        entry = file.tensors[f"blk.1.{name}.weight"]
        stored = file.read_rows(entry, first, len(values))
        assert entry.ggml_type is GGMLQuantizationType.IQ4_NL
        assert (stored == quantize_rows(values.contiguous(), entry.ggml_type, inputs, name=name)).all(), name


def test_what_was_written_is_no_damage_and_another_tensor_is(student: Student, tmp_path: Path) -> None:
    for mix in ("F32", "Q4_K_M"):
        weights = GgufWeights(_written(student, tmp_path, mix), student.spec)
        assert compare_weights(student, student.as_written(weights), weights.stored_type).damage == ()
    name = student.name(Role.ATTENTION_NORM, 1)
    other = student.with_overlay({name: student.tensor(Role.ATTENTION_NORM, 1) * 1.01})
    (damage,) = compare_weights(other, student.as_written(weights), weights.stored_type).damage
    assert (damage.unit.role, damage.unit.layer, damage.fault) == (Role.ATTENTION_NORM, 1, Fault.CHANGED)


def test_values_of_parts_are_tuned_in_the_model_s_order(student: Student, tmp_path: Path) -> None:
    path = _written(student, tmp_path, "Q8_0")
    weights = GgufWeights(path, student.spec)
    has_scales = {role: weights.block_length(role, 1) == 32 for role in _PARTS if role is not Role.ATTENTION_NORM}
    assert [role for role in has_scales if has_scales[role]] == [Role.KEY]
    with pytest.raises(InputError, match="attn_even"):
        weights.tunable(Role.VALUE, 1)
    keep_values(weights, student.spec, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert {"blk.1.attn_k.weight", "blk.1.attn_norm.weight", "blk.0.ffn_up.weight"} <= set(kept)
    assert not {"blk.1.attn_even.weight", "blk.1.ffn_gate_exps.weight"} & set(kept)
    before, key = path.read_bytes(), weights.tensor(Role.KEY, 1)
    rewrite(weights, kept)
    assert path.read_bytes() == before
    scales, norm = kept["blk.1.attn_k.weight"], torch.arange(256.0) / 128
    scales[:32] *= 2  # the first head's
    key[:32] *= 2
    rewrite(GgufWeights(path, student.spec), {"blk.1.attn_norm.weight": norm, "blk.1.attn_k.weight": scales})
    tuned = GgufWeights(path, student.spec)
    assert torch.equal(tuned.tensor(Role.ATTENTION_NORM, 1), norm)
    assert torch.equal(tuned.tunable(Role.KEY, 1), scales)
    assert torch.equal(tuned.tensor(Role.KEY, 1), key)


def test_a_matrix_in_parts_is_one_unit(student: Student) -> None:
    units = {unit.name: unit for unit in plan_gguf_units(student.spec)}
    assert units["blk.1.attn_even.weight"].tensors == ("blk.1.attn_even.weight", "blk.1.attn_odd.weight")
    assert "blk.1.attn_odd.weight" not in units
    # rows of 32 queries have no types of 256
    assert {candidate.choice for candidate in units["blk.1.attn_k_b.weight"].candidates} == {
        "Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0"
    }  # fmt: skip


def test_importance_from_a_file_is_put_into_the_model_s_order(student: Student, tmp_path: Path) -> None:
    matrices = [
        tensor
        for tensor in plan_tensors(student.spec, "F32")
        if tensor.is_matrix and tensor.layer is not None and tensor.name != "blk.2.attn_k_b.weight"  # nobody misses it
    ]
    random, entries, data = torch.Generator().manual_seed(1), [], []
    sums = {}
    for tensor in matrices:
        n_matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
        sums[tensor.name] = torch.rand(n_matrices, tensor.row_length, generator=random)
        for suffix, values in ((".in_sum2", sums[tensor.name]), (".counts", torch.ones(n_matrices, 1))):
            entries.append(
                TensorEntry(tensor.name + suffix, tuple(values.shape), GGMLQuantizationType.F32, values.nbytes)
            )
            data.append(values.numpy().tobytes().ljust(aligned(values.nbytes), b"\0"))
    header = render_header(1, render_values({"general.type": string("imatrix")}), entries)
    (tmp_path / "x.gguf").write_bytes(header + b"".join(data))
    found = read_imatrix(tmp_path / "x.gguf", student.spec)
    assert (Role.QUERY, 1) not in found  # its rows in the file have other inputs
    assert torch.equal(found[Role.VALUE, 1], sums["blk.1.attn_even.weight"][0])
    assert torch.equal(found[Role.EXPERT_DOWN, 2], sums["blk.2.ffn_down_exps.weight"])
    tiled = torch.arange(256).reshape(4, 2, 32).transpose(0, 1).flatten()
    assert torch.equal(found[Role.ATTENTION_OUTPUT, 1][tiled], sums["blk.1.ssm_out.weight"][0])


def test_a_dense_layer_is_saved_beside_layers_with_experts(student: Student, tmp_path: Path) -> None:
    write_checkpoint(student, tmp_path / "saved")
    stored = {
        name: tensor for file in (tmp_path / "saved").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], student.tensor(Role.EXPERT_UP, 0))
    assert torch.equal(stored["model.layers.1.mlp.experts.3.up_proj.weight"], student.expert(Role.EXPERT_UP, 1, 3))
    assert "model.layers.0.mlp.gate.weight" not in stored
    assert stored["model.layers.1.mlp.gate.weight"].shape == (5, 256)


def test_experts_that_are_only_ever_together_are_saved_so(student: Student, tmp_path: Path) -> None:
    names = {Role.EXPERT_GATE: "in", Role.EXPERT_UP: "in", Role.EXPERT_DOWN: "out"}
    fused = {
        Role.EXPERT_GATE: Fused("model.layers.{layer}.in", 0, 2, is_only_form=True),
        Role.EXPERT_UP: Fused("model.layers.{layer}.in", 1, 2, is_only_form=True),
        Role.EXPERT_DOWN: Fused("model.layers.{layer}.out", is_only_form=True),
    }
    checkpoint = copy.copy(student.source)
    checkpoint._fused = lambda _tensor, _layer: None  # the file that is read has them apart
    checkpoint.spec = replace(
        checkpoint.spec,
        layers=tuple(
            replace(
                layer,
                tensors=tuple(
                    replace(tensor, fused=fused[tensor.role]) if tensor.is_per_expert else tensor
                    for tensor in layer.tensors
                ),
            )
            for layer in checkpoint.spec.layers
        ),
    )
    name = student.name(Role.EXPERT_UP, 1, 2)
    tuned = Student(checkpoint, student.experts, {name: student.expert(Role.EXPERT_UP, 1, 2).float() + 1e-4})
    write_checkpoint(tuned, tmp_path / "saved")
    stored = {
        name: tensor for file in (tmp_path / "saved").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert not [name for name in stored if ".experts." in name]
    for layer in (1, 2):
        both = [[tuned.expert(role, layer, expert) for role in list(names)[:2]] for expert in range(5)]
        expected = torch.stack([torch.cat([gate.float(), up.float()]) for gate, up in both])
        assert torch.equal(stored[f"model.layers.{layer}.in"].float(), expected)
        down = torch.stack([tuned.expert(Role.EXPERT_DOWN, layer, expert) for expert in range(5)])
        assert torch.equal(stored[f"model.layers.{layer}.out"], down)
    assert (stored["model.layers.1.in"].dtype, stored["model.layers.2.in"].dtype) == (torch.float32, torch.bfloat16)


def test_dense_layers_stand_before_the_others(student: Student) -> None:
    spec = student.spec
    dense, *routed = spec.layers
    with pytest.raises(UnsupportedError, match="layer 1 of this model has none: it cannot be written as GGUF"):
        plan_tensors(replace(spec, layers=(routed[0], dense, routed[1])), "F32")

"""The parts that only Nemotron-H has: experts without a gate, and steps that only transformers limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.running.gradients import ParameterKey, streamed_gradients
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent
from compressors.shrink.decompose import ActivationSvd, D2Moe, Mobe
from compressors.shrink.layerwise import _block
from compressors.shrink.merge import REAM, HCSMoE, MSMoE
from compressors.shrink.moe_block import Evidence, Method, MoeBlock
from compressors.shrink.slim.width import SlimWidth
from exporter.capabilities.rules import Container
from exporter.planning.teacher_floor import _fewest_layers
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.writing.onnx.session import Session
from tests.families.checkpoints import write_model
from tests.families.conftest import logits_of
from tests.families.rows import Row
from validate.files.graph_settings import graph_setting_symptoms


@pytest.fixture(scope="module", params=["nemotron_h"])
def family(request: pytest.FixtureRequest) -> str:
    """The one family."""
    return str(request.param)


def _stock_tensors(stock: nn.Module, leaves: Mapping[ParameterKey, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of the stock model, and its routers, as functions of what is trained."""
    found: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(stock.model.layers):
        if ("router", layer) not in leaves:
            continue
        prefix = f"model.layers.{layer}.mixer"
        found[f"{prefix}.gate.weight"] = leaves["router", layer]
        for name, module in (("gate_up", "up_proj"), ("down", "down_proj")):
            stored = block.mixer.experts.get_parameter(module).detach()
            if (f"{name}.weight", layer) in leaves:
                found[f"{prefix}.experts.{module}"] = leaves[f"{name}.weight", layer]
            elif (f"{name}.a", layer) in leaves:
                a_NRI, b_NOR = leaves[f"{name}.a", layer].squeeze(1), leaves[f"{name}.b", layer].squeeze(1)
                found[f"{prefix}.experts.{module}"] = stored + b_NOR @ a_NRI
            else:
                factors_NOK = leaves[f"{name}.factors.0", layer]
                length = stored.shape[-1] // factors_NOK.shape[-1]
                found[f"{prefix}.experts.{module}"] = stored * factors_NOK.repeat_interleave(length, dim=-1)
    return found


@pytest.mark.parametrize("scope", [Scope.all_experts(), Scope.adapters(3), Scope(scales=True)], ids=lambda s: s.name)
def test_gradients_of_experts_equal_autograd_s(
    folder: Path, stock: nn.Module, blocks_BT: torch.Tensor, scope: Scope
) -> None:
    student = Student.teacher(Checkpoint(folder))
    lengths = {Role.EXPERT_UP: 32, Role.EXPERT_DOWN: 16}
    usage = [torch.ones(layer.n_experts) for layer in student.spec.layers]
    trained = TrainedStudent(student, scope, usage=usage, block_length=lambda role, _layer: lengths.get(role), seed=7)
    generator = torch.Generator().manual_seed(1)
    for (name, _), tensor in trained.parameters.items():
        if name.endswith(".b"):
            tensor.data.normal_(0, 0.05, generator=generator)
        if "factors" in name:
            tensor.data.uniform_(0.8, 1.2, generator=generator)
    targets = blocks_BT.flatten().roll(-1)

    def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_NV, targets[positions], reduction="sum")

    _, gradients = streamed_gradients(trained.streamed(None), blocks_BT, loss)
    leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in trained.parameters.items()}
    logits = functional_call(stock, _stock_tensors(stock, leaves), (blocks_BT,), {"use_cache": False}).logits
    loss(slice(None), logits.flatten(0, 1)).backward()
    assert set(gradients) == set(leaves)
    for key, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0
        assert (gradients[key] - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), key
    if not scope.scales:
        taught = student.with_overlay(trained.overlay())
        merged = _stock_tensors(stock, leaves)["model.layers.1.mixer.experts.up_proj"][3]
        assert torch.allclose(taught.expert(Role.EXPERT_UP, 1, 3).float(), merged, atol=1e-6)


@pytest.fixture(scope="module")
def block(folder: Path) -> MoeBlock:
    """The experts of the second block."""
    student = Student.teacher(Checkpoint(folder))
    (_, weights), *_ = StreamedModel(student).weights([1])
    return _block(student.spec.layers[1], weights)


def test_every_method_leaves_alone_what_it_can(block: MoeBlock, folder: Path) -> None:
    """Twins merge into themselves, factors of full rank are the matrices, and idle neurons go first."""
    inputs_TD = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    layer = Checkpoint(folder).spec.layers[1]
    statistics = LayerStatistics.zeros(layer)
    for expert in range(8):
        tokens, gates = block.route(inputs_TD).of_expert(expert)
        statistics.count_E[expert], statistics.gate_sum_E[expert] = len(tokens), gates.sum()
        statistics.gate_norm_sum_E[expert] = statistics.norm_sum_E[expert] = 1 + len(tokens)
    statistics.router_logit_gram_EE += torch.eye(8)
    evidence = Evidence(statistics, inputs_TD)
    down_EDF = block.down_EDF.clone()
    down_EDF[:, :, 1::2] = 0
    idle = replace(block, down_EDF=down_EDF)
    twins = replace(block, gate_up_EFD=block.gate_up_EFD[[0] * 8], down_EDF=block.down_EDF[[0] * 8])
    expected = block.forward(inputs_TD)
    exact: list[Method] = [ActivationSvd(32), D2Moe(32)]
    for method in exact:
        found = method(block, evidence).block.forward(inputs_TD)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    fitted = Mobe(8, steps=1, activation="tanh")(block, evidence).block
    assert fitted.gate_up_EFD.shape == block.gate_up_EFD.shape
    narrower = SlimWidth(16)(idle, evidence).block
    assert narrower.gate_up_EFD.shape == (8, 16, 64)
    assert (narrower.forward(inputs_TD) - idle.forward(inputs_TD)).abs().max() < 1e-4 * expected.abs().max()
    merging: list[Method] = [REAM(3), MSMoE(3), HCSMoE(3)]
    for method in merging:
        merged = method(twins, evidence).block
        assert torch.allclose(merged.gate_up_EFD, twins.gate_up_EFD[:3], atol=1e-6)
        assert torch.allclose(merged.down_EDF, twins.down_EDF[:3], atol=1e-6)


def test_both_copies_of_a_row_have_the_values_that_replace_them(folder: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes each row of up for the gate too."""
    student = Student.teacher(Checkpoint(folder))
    units = {unit.name: "4@16" for unit in onnx_units(student.spec) if unit.name.endswith(".experts")}
    write_onnx(student, "F32", tmp_path, encodings=units, threads=1)
    weights = OnnxWeights(tmp_path, student.spec)
    places = {f"blk.{layer}.ffn_up_exps.weight": layer for layer in (1, 4)}
    values = {name: weights.tunable(Role.EXPERT_UP, layer) * 2 for name, layer in places.items()}
    changed = weights.with_values(values)
    before, after = torch.empty(32, 64), torch.empty(32, 64)
    weights.read_expert(Role.EXPERT_UP, 4, 5, before)
    changed.read_expert(Role.EXPERT_UP, 4, 5, after)
    assert torch.equal(after, 2 * before) and before.any()
    parts = list(changed.changed_parts())
    assert len(parts) == 2
    for part in parts:
        stored = np.fromfile(part.file, np.uint8, part.n_bytes, offset=part.offset)
        scales = stored.copy()
        part.put(scales)
        rows = scales.view(np.float16).reshape(-1, 2, 4)
        assert np.array_equal(rows[:, 0], rows[:, 1])
        assert np.array_equal(rows, 2 * stored.view(np.float16).reshape(rows.shape))


@pytest.mark.parametrize("container", [Container.GGUF, Container.ONNX])
def test_the_first_blocks_that_a_container_holds_have_experts_and_attend(folder: Path, container: Container) -> None:
    assert _fewest_layers(Checkpoint(folder).spec, container) == 3


@torch.no_grad()
def test_blocks_with_a_dense_feed_forward(row: Row, fine_folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    """No file of the hub has them beside blocks with experts, and llama.cpp does not load them."""
    kinds = ["linear_attention", "mlp", "full_attention", "moe", "mlp"]
    spelled = replace(row, on_the_hub={**row.on_the_hub, "hybrid_override_pattern": "M-*E-"})
    write_model("nemotron_h", spelled, tmp_path / "model", fine_folder, layers_block_type=kinds)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    expected = stock(blocks_BT).logits
    student = Student.teacher(Checkpoint(tmp_path / "model"))
    assert (logits_of(StreamedModel(student), blocks_BT) - expected.flatten(0, 1)).abs().max() < 1e-4 * expected.max()
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    assert graph_setting_symptoms(tmp_path / "onnx" / MODEL_FILE, student.spec) == []
    found = Session(tmp_path / "onnx").feed(blocks_BT.numpy(), np.ones(blocks_BT.shape, np.int64))
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.max()


@torch.no_grad()
def test_steps_have_no_lower_limit(folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    """Where steps are as small as this, transformers' class computes something else than NVIDIA's and llama.cpp."""
    path = tmp_path / "small-steps"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    shifted = {name: tensor - 9 if name.endswith("dt_bias") else tensor for name, tensor in tensors.items()}
    save_file(shifted, path / "model.safetensors", metadata={"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    limited = stock(blocks_BT).logits.flatten(0, 1)
    for layer in stock.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            assert layer.mixer.time_step_limit[0] == 0.001
            layer.mixer.time_step_limit = (0.0, float("inf"))
    expected = stock(blocks_BT).logits.flatten(0, 1)
    found = logits_of(StreamedModel(Student.teacher(Checkpoint(path))), blocks_BT)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() < (limited - expected).abs().max()

"""Layer-by-layer execution against stock transformers, forward and backward, on trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.recorder import RoutingRecorder
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import ExpertMap, Student


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[-6 * 96 :].reshape(6, 96))


def _stock(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    return torch.cat([logits for _, logits in model.logits_in_chunks(hidden.flatten(0, 1))]).detach()


@torch.no_grad()
def test_logits_equal_stock_transformers(family_folder: Path, blocks_BT: torch.Tensor) -> None:
    expected = _stock(family_folder)(blocks_BT).logits.flatten(0, 1)
    logits = _logits(StreamedModel(Student.teacher(Checkpoint(family_folder))), blocks_BT)
    assert (logits - expected).abs().max() < 1e-4  # logits reach 15; float32 sums in another order


@torch.no_grad()
def test_kept_layers_and_several_groups_change_nothing(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    teacher = Student.teacher(Checkpoint(fine_folder))
    together = StreamedModel(teacher).stream([TokenGroup(blocks_BT[:4]), TokenGroup(blocks_BT[4:])])
    kept = StreamedModel(teacher, keep_layers=True)
    for _ in range(2):
        (alone,) = kept.stream([TokenGroup(blocks_BT)])
        assert torch.equal(torch.cat(together), alone)


@torch.no_grad()
def test_recorded_routing_is_the_router_s(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    model = StreamedModel(Student.teacher(Checkpoint(fine_folder)))
    recorder = RoutingRecorder(model.shape)
    model.stream([TokenGroup(blocks_BT, [recorder.observe])])
    stock = _stock(fine_folder)
    outputs: list[torch.Tensor] = []
    stock.model.layers[3].mlp.gate.register_forward_hook(lambda _m, _i, out: outputs.append(out[2]))
    stock(blocks_BT)
    same = torch.from_numpy(recorder.routing().experts_LTK[3]) == outputs[0]
    assert same.float().mean() > 0.999


def test_gradients_equal_autograd_on_the_whole_model(family_folder: Path, blocks_BT: torch.Tensor) -> None:
    student = Student.teacher(Checkpoint(family_folder))
    routers = {
        (Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float())
        for layer in range(student.shape.n_layers)
    }
    targets = blocks_BT.flatten().roll(-1)

    def loss(positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, targets[positions], reduction="sum")

    total, gradients = StreamedModel(student, trainable=routers).gradients(blocks_BT, loss)
    stock = _stock(family_folder)
    expected = loss(slice(None), stock(blocks_BT).logits.flatten(0, 1))
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for layer, module in enumerate(stock.model.layers):
        wanted = module.mlp.gate.weight.grad
        assert (gradients[Role.ROUTER, layer] - wanted).norm() / wanted.norm() < 1e-4


@torch.no_grad()
def test_a_pruned_student_equals_stock_transformers_with_sliced_weights(
    family_folder: Path, blocks_BT: torch.Tensor
) -> None:
    source = Checkpoint(family_folder)
    shape = source.shape
    kept = tuple(tuple(range(layer % 2, shape.n_experts, 2)) for layer in range(shape.n_layers))
    stock = _stock(family_folder)
    for layer, module in enumerate(stock.model.layers):
        module.mlp.gate.weight = nn.Parameter(module.mlp.gate.weight[list(kept[layer])])
        module.mlp.gate.num_experts = module.mlp.experts.num_experts = shape.n_experts // 2
        module.mlp.experts.gate_up_proj = nn.Parameter(module.mlp.experts.gate_up_proj[list(kept[layer])])
        module.mlp.experts.down_proj = nn.Parameter(module.mlp.experts.down_proj[list(kept[layer])])
    expected = stock(blocks_BT).logits.flatten(0, 1)
    logits = _logits(StreamedModel(Student(source, ExpertMap(shape.n_experts, kept))), blocks_BT)
    assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_fused_experts_on_disk_are_read_like_single_ones(fine_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(fine_folder)
    tensors = load_file(fine_folder / "model.safetensors")
    for layer in range(source.shape.n_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        single = [
            {name: tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for name in ("gate", "up", "down")}
            for expert in range(source.shape.n_experts)
        ]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in single])
        tensors[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in single])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((fine_folder / "config.json").read_bytes())
    fused = Checkpoint(tmp_path)
    for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
        assert torch.equal(fused.expert(role, 4, 17), source.expert(role, 4, 17))


def test_a_weight_that_is_not_finite_is_named(toy_checkpoint: object, tmp_path: Path) -> None:
    folder = toy_checkpoint(tmp_path)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    model = StreamedModel(Student.teacher(Checkpoint(folder)), check_finite=True)
    with pytest.raises(InputError, match=name):
        model.stream([TokenGroup(torch.zeros(1, 4, dtype=torch.int64))])

"""Layer-by-layer execution against stock transformers, forward and backward, on trained weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.predictions.routing_record import NO_EXPERT
from compressors.model.running.gradients import streamed_gradients
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from tests.altered import with_factors

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[-6 * 96 :].reshape(6, 96))


def _stock(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    everywhere = slice(0, tokens_BT.shape[1])
    return torch.cat([logits for _, logits in model.logits_in_chunks(hidden, everywhere)]).detach()


def _all(hidden: HiddenStates) -> torch.Tensor:
    return hidden.read(slice(0, len(hidden)))


@torch.no_grad()
def test_logits_equal_stock_transformers(family_folder: Path, blocks_BT: torch.Tensor) -> None:
    expected = _stock(family_folder)(blocks_BT).logits.flatten(0, 1)
    logits = _logits(StreamedModel(Student.teacher(Checkpoint(family_folder))), blocks_BT)
    assert (logits - expected).abs().max() < 1e-4  # logits reach 15; float32 sums in another order


@torch.no_grad()
def test_a_dtype_that_no_weights_can_have_changes_nothing(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, blocks_BT: torch.Tensor
) -> None:
    """``dtype`` is that of the files, and everything is computed in float32."""
    folder = toy_checkpoint(tmp_path, n_layers=1)
    expected = _logits(StreamedModel(Student.teacher(Checkpoint(folder))), blocks_BT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    assert torch.equal(_logits(StreamedModel(Student.teacher(Checkpoint(folder))), blocks_BT), expected)


@pytest.mark.parametrize("n_bytes", [1, 10**12])
def test_memory_and_grouping_change_no_bit(
    fine_folder: Path, blocks_BT: torch.Tensor, tmp_path: Path, n_bytes: int
) -> None:
    """Neither resident layers, nor one buffer instead of two, nor hidden states on disk."""
    teacher = Student.teacher(Checkpoint(fine_folder))
    together = StreamedModel(teacher).stream([TokenGroup(blocks_BT[:4]), TokenGroup(blocks_BT[4:])])
    limited = StreamedModel(teacher, limit=MemoryLimit(n_bytes, tmp_path))
    for _ in range(2):
        parts = limited.stream([TokenGroup(blocks_BT[:4]), TokenGroup(blocks_BT[4:])])
        assert all(torch.equal(_all(one), _all(other)) for one, other in zip(together, parts, strict=True))
    (alone,) = limited.stream([TokenGroup(blocks_BT)])
    joined = torch.cat([_all(part) for part in together])
    assert (joined - _all(alone)).abs().max() < 1e-3  # float32 sums over other numbers of tokens


@torch.no_grad()
def test_bfloat16_is_near_the_reference_and_keeps_routers_in_float32(
    family_folder: Path, blocks_BT: torch.Tensor
) -> None:
    model = StreamedModel(Student.teacher(Checkpoint(family_folder)))
    router_dtypes = set()

    @contextmanager
    def observe(_index: int, layer: nn.Module) -> Iterator[None]:
        gate = layer.get_submodule("mlp.gate")
        handle = gate.register_forward_hook(lambda m, i, o: router_dtypes.update({m.weight.dtype, i[0].dtype}))
        yield
        handle.remove()

    exact, rounded = model.stream([TokenGroup(blocks_BT), TokenGroup(blocks_BT, [observe], torch.bfloat16)])
    assert router_dtypes == {torch.float32}
    assert rounded.dtype == torch.bfloat16
    reference = _all(exact)
    assert (_all(rounded).float() - reference).norm() / reference.norm() < 0.05


@torch.no_grad()
def test_recorded_routing_is_the_router_s(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    model = StreamedModel(Student.teacher(Checkpoint(fine_folder)))
    recorder = RoutingRecorder(model.spec)
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
        for layer in range(student.spec.n_layers)
    }
    targets = blocks_BT.flatten().roll(-1)

    def loss(positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, targets[positions], reduction="sum")

    total, gradients = streamed_gradients(StreamedModel(student, trainable=routers), blocks_BT, loss)
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
    spec = source.spec
    kept = tuple(tuple(range(layer % 2, spec.n_experts, 2)) for layer in range(spec.n_layers))
    stock = _stock(family_folder)
    for layer, module in enumerate(stock.model.layers):
        module.mlp.gate.weight = nn.Parameter(module.mlp.gate.weight[list(kept[layer])])
        module.mlp.gate.num_experts = module.mlp.experts.num_experts = spec.n_experts // 2
        module.mlp.experts.gate_up_proj = nn.Parameter(module.mlp.experts.gate_up_proj[list(kept[layer])])
        module.mlp.experts.down_proj = nn.Parameter(module.mlp.experts.down_proj[list(kept[layer])])
    expected = stock(blocks_BT).logits.flatten(0, 1)
    logits = _logits(StreamedModel(Student(source, ExpertMap.keeping(spec.n_experts, kept))), blocks_BT)
    assert (logits - expected).abs().max() < 1e-4


def _student_whose_layers_differ(source: Checkpoint) -> Student:
    """A dropped block, a layer without experts, one with fewer, one with a single expert, and narrow ones."""
    full, n_experts = source.spec.expert_width, source.spec.n_experts
    everything = tuple((expert,) for expert in range(n_experts))
    layers = (
        LayerMap(0, ((5,), (0,), (7,), (2,), (3,))),
        LayerMap(2, ()),
        LayerMap(3, everything, full // 2),
        LayerMap(4, ((6,),), full // 4),
        LayerMap(5, everything),
    )
    layers = tuple(layer for layer in layers if layer.source < source.spec.n_layers)
    overlay = {}
    pruned = Student(source, ExpertMap(n_experts, layers))
    for index, layer in enumerate(layers):
        for number, (expert,) in enumerate(layer.groups if layer.width else ()):
            neurons = list(range(expert % 2, full, full // (layer.width or full)))[: layer.width]
            for role in _EXPERT_ROLES:
                values = source.expert(role, layer.source, expert)
                overlay[pruned.name(role, index, number)] = (
                    values[:, neurons] if role is Role.EXPERT_DOWN else values[neurons]
                )
    return pruned.with_overlay(overlay)


class _AddsNothing(nn.Module):
    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD * 0


def _stock_like(student: Student) -> nn.Module:
    """Stock transformers, cut to the student by hand."""
    stock, layers = _stock(student.source.path), student.experts.layers
    for index, layer in enumerate(layers):
        module = stock.model.layers[layer.source]
        if not layer.groups:
            module.mlp = _AddsNothing()
            continue
        kept, gate, experts = list(layer.kept), module.mlp.gate, module.mlp.experts
        gate.weight = nn.Parameter(gate.weight[kept].detach())
        gate.num_experts = experts.num_experts = len(kept)
        gate.top_k = min(gate.top_k, len(kept))
        gate_up, down = experts.gate_up_proj[kept].detach(), experts.down_proj[kept].detach()
        if layer.width is not None:
            parts = {
                role: torch.stack(
                    [student.overlay[student.name(role, index, number)] for number in range(len(kept))]
                ).float()
                for role in _EXPERT_ROLES
            }
            gate_up = torch.cat([parts[Role.EXPERT_GATE], parts[Role.EXPERT_UP]], dim=1)
            down = parts[Role.EXPERT_DOWN]
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    stock.model.layers = nn.ModuleList([stock.model.layers[layer.source] for layer in layers])
    stock.config.num_hidden_layers = len(layers)
    return stock


@torch.no_grad()
def test_a_student_whose_layers_differ_equals_stock_transformers_cut_by_hand(
    family_folder: Path, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    student = _student_whose_layers_differ(Checkpoint(family_folder))
    assert not student.spec.is_uniform
    expected = _stock_like(student)(blocks_BT, use_cache=False).logits.flatten(0, 1)
    for limit in (None, MemoryLimit(1, tmp_path), MemoryLimit(10**12, tmp_path)):
        model = StreamedModel(student, limit=limit, check_finite=True)
        for _ in range(2):  # buffers are used again, by layers of other sizes
            assert (_logits(model, blocks_BT) - expected).abs().max() < 1e-4


def test_gradients_of_a_student_whose_layers_differ_equal_autograd(
    family_folder: Path, blocks_BT: torch.Tensor
) -> None:
    student = _student_whose_layers_differ(Checkpoint(family_folder))
    with_experts = [layer for layer in range(student.spec.n_layers) if student.spec.layers[layer].routed]
    routers = {(Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float()) for layer in with_experts}
    targets = blocks_BT.flatten().roll(-1)

    def loss(positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, targets[positions], reduction="sum")

    total, gradients = streamed_gradients(StreamedModel(student, trainable=routers), blocks_BT, loss)
    stock = _stock_like(student)
    expected = loss(slice(None), stock(blocks_BT, use_cache=False).logits.flatten(0, 1))
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert {layer for _, layer in gradients} == set(with_experts)
    for layer in with_experts:
        wanted = stock.model.layers[layer].mlp.gate.weight.grad
        assert gradients[Role.ROUTER, layer].shape == wanted.shape
        assert (gradients[Role.ROUTER, layer] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


@torch.no_grad()
def test_recorded_routing_holds_no_expert_where_there_is_none(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    student = _student_whose_layers_differ(Checkpoint(fine_folder))
    recorder = RoutingRecorder(student.spec)
    StreamedModel(student).stream([TokenGroup(blocks_BT, [recorder.observe])])
    routing = recorder.routing()
    stock = _stock_like(student)
    chosen: dict[int, torch.Tensor] = {}
    for layer in (0, 2, 3, 4):
        stock.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: chosen.update({layer: output[2]})
        )
    stock(blocks_BT, use_cache=False)
    assert routing.experts_LTK.shape == routing.weights_LTK.shape == (5, blocks_BT.numel(), 4)
    assert (routing.experts_LTK[1] == NO_EXPERT).all()
    assert not routing.weights_LTK[1].any()
    assert (routing.experts_LTK[3] == [0, NO_EXPERT, NO_EXPERT, NO_EXPERT]).all()
    np.testing.assert_allclose(routing.weights_LTK[3], np.array([[1.0, 0, 0, 0]]).repeat(blocks_BT.numel(), 0))
    for layer in (0, 2, 4):
        assert (routing.experts_LTK[layer] == chosen[layer].numpy()).mean() > 0.999


@torch.no_grad()
def test_fused_experts_on_disk_are_read_like_single_ones(fine_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(fine_folder)
    tensors = load_file(fine_folder / "model.safetensors")
    for layer in range(source.spec.n_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        single = [
            {name: tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for name in ("gate", "up", "down")}
            for expert in range(source.spec.n_experts)
        ]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in single])
        tensors[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in single])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((fine_folder / "config.json").read_bytes())
    fused = Checkpoint(tmp_path)
    for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
        assert torch.equal(fused.expert(role, 4, 17), source.expert(role, 4, 17))


@torch.no_grad()
def test_factors_of_embeddings_and_logits_are_applied(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, blocks_BT: torch.Tensor
) -> None:
    folder = toy_checkpoint(tmp_path, model="olmoe")
    expected = _logits(StreamedModel(Student.teacher(Checkpoint(folder))), blocks_BT)
    scaled = with_factors(folder, tmp_path / "scaled")
    assert torch.equal(_logits(StreamedModel(Student.teacher(scaled)), blocks_BT), expected)


def test_a_weight_that_is_not_finite_is_named(toy_checkpoint: object, tmp_path: Path) -> None:
    folder = toy_checkpoint(tmp_path)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    model = StreamedModel(Student.teacher(Checkpoint(folder)), check_finite=True)
    with pytest.raises(InputError, match=name):
        model.stream([TokenGroup(torch.zeros(1, 4, dtype=torch.int64))])


def test_a_value_that_becomes_not_finite_is_traced_to_its_expert(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, blocks_BT: torch.Tensor
) -> None:
    folder = toy_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for expert in (9, 20):
        tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    model = StreamedModel(Student.teacher(Checkpoint(folder)), check_finite=True)
    with pytest.raises(InputError, match=r"layer 1 .* expert 9"):
        model.stream([TokenGroup(blocks_BT)])


def test_attention_is_named_when_it_makes_the_value(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, blocks_BT: torch.Tensor
) -> None:
    folder = toy_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layer 0 .* its attention"):
        StreamedModel(Student.teacher(Checkpoint(folder))).stream([TokenGroup(blocks_BT)])


def test_a_file_that_changes_during_the_pass_is_named(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, blocks_BT: torch.Tensor
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=3)
    model = StreamedModel(Student.teacher(Checkpoint(folder)))
    groups = [TokenGroup(blocks_BT)]
    layers = model.advance(groups, model.first_states(groups), range(3))
    next(layers)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor .* now has 1000000"):
        list(layers)

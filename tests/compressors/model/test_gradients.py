"""The streamed backward pass against torch autograd on stock transformers, for everything that can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.running.gradients import ParameterKey, streamed_gradients
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover.objectives import RouterLogitMatching
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent

_USAGE = [[3, 9, 0, 1, 9, 2, 4, 1], [0, 0, 8, 0, 0, 0, 0, 7]]  # of the first eight experts of each layer
_MOST_USED = [(1, 4), (2, 7)]


@pytest.fixture(scope="module", params=["fine", "coarse"])
def folder(
    request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two layers of each of the two models."""
    return toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model=request.param)


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """Ten blocks: more than a layer takes at once."""
    return torch.from_numpy(heldout_tokens[: 10 * 16].reshape(10, 16))


def _block_length(role: Role, layer: int) -> int | None:
    """Block lengths of a file with different types: one layer's up projections and values have no scales."""
    if layer == 1 and role in (Role.EXPERT_UP, Role.VALUE):
        return None
    return {Role.EXPERT_GATE: 64, Role.EXPERT_DOWN: 32}.get(role, 128)


def _trained(student: Student, scope: Scope) -> TrainedStudent:
    n_experts = student.spec.n_experts
    usage = [torch.tensor(counts + [0] * (n_experts - 8)) for counts in _USAGE]
    trained = TrainedStudent(student, scope, usage=usage, block_length=_block_length, seed=7)
    generator = torch.Generator().manual_seed(1)
    for (name, _), tensor in trained.parameters.items():
        if name.endswith(".b"):  # it begins as zero, and then A has no gradient
            tensor.data.normal_(0, 0.02, generator=generator)
        if "factors" in name:  # they begin as one, and then a factor that is forgotten changes nothing
            tensor.data.uniform_(0.8, 1.2, generator=generator)
    return trained


def _cross_entropy(tokens_BT: torch.Tensor) -> Callable[[slice, torch.Tensor], torch.Tensor]:
    targets = tokens_BT.flatten().roll(-1)

    def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_NV, targets[positions], reduction="sum")

    return loss


_OTHERS = {
    "attention norm": "input_layernorm",
    "MoE norm": "post_attention_layernorm",
    "query norm": "self_attn.q_norm",
    "key norm": "self_attn.k_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention output": "self_attn.o_proj",
}


def _times_blocks(matrix_RI: torch.Tensor, factors_RK: torch.Tensor) -> torch.Tensor:
    return matrix_RI * factors_RK.repeat_interleave(matrix_RI.shape[1] // factors_RK.shape[1], dim=1)


def _stock_tensors(
    stock: nn.Module, leaves: Mapping[ParameterKey, torch.Tensor], experts: list[tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The stock model's tensors as functions of what is trained, written out expert by expert."""
    tensors: dict[str, torch.Tensor] = {}
    if ("final norm", None) in leaves:
        tensors["model.norm.weight"] = leaves["final norm", None]
    for layer, module in enumerate(stock.model.layers):
        for role, name in _OTHERS.items():
            if (role, layer) in leaves:
                tensors[f"model.layers.{layer}.{name}.weight"] = leaves[role, layer]
            elif (f"{role} factors", layer) in leaves:
                stored, factors = module.get_submodule(name).weight.detach(), leaves[f"{role} factors", layer]
                tensors[f"model.layers.{layer}.{name}.weight"] = _times_blocks(stored, factors)
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = leaves["router", layer]
        for name in ("gate_up", "down"):
            matrices = list(module.mlp.experts.get_parameter(f"{name}_proj").detach())
            for row, expert in enumerate(experts[layer]):
                if (f"{name}.weight", layer) in leaves:
                    matrices[expert] = leaves[f"{name}.weight", layer][row]
                elif (f"{name}.a", layer) in leaves:
                    a_PRI, b_POR = leaves[f"{name}.a", layer][row], leaves[f"{name}.b", layer][row]
                    products = [b @ a for a, b in zip(a_PRI, b_POR, strict=True)]
                    matrices[expert] = matrices[expert] + torch.cat(products)
                else:
                    parts = matrices[expert].chunk(2 if name == "gate_up" else 1)
                    factors = [leaves.get((f"{name}.factors.{part}", layer)) for part in range(len(parts))]
                    scaled = [
                        part if of_part is None else _times_blocks(part, of_part[row])
                        for part, of_part in zip(parts, factors, strict=True)
                    ]
                    matrices[expert] = torch.cat(scaled)
            tensors[f"{prefix}.experts.{name}_proj"] = torch.stack(matrices)
    return tensors


_SCOPES = [
    Scope.routers(),
    Scope.most_used(2),
    Scope.all_experts(),
    Scope.adapters(3),
    Scope.routers_and_norms(),
    Scope.block_scales(),
    Scope.everything(),
]


@pytest.mark.parametrize("scope", _SCOPES, ids=lambda scope: scope.name)
def test_gradients_equal_autograd_on_the_whole_model(folder: Path, blocks_BT: torch.Tensor, scope: Scope) -> None:
    student = Student.teacher(open_source(folder))
    trained = _trained(student, scope)
    total, gradients = streamed_gradients(trained.streamed(None), blocks_BT, _cross_entropy(blocks_BT))

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in trained.parameters.items()}
    everything = tuple(range(student.spec.n_experts))
    experts = _MOST_USED if scope == Scope.most_used(2) else [everything] * 2
    n_others = len(student.spec.layers[0].shared_tensors) - 1  # without the router
    assert len(leaves) == {
        "router": 2,
        "router + norms": 2 + 1 + 2 * (n_others - 4),
        "router + norms + block scales": 2 + 1 + 2 * (n_others + 3) - 2,
        "router + norms + attention + all experts": 2 + 1 + 2 * (n_others + 2),
    }.get(scope.name, len(leaves))
    logits = functional_call(stock, _stock_tensors(stock, leaves, experts), (blocks_BT,), {"use_cache": False}).logits
    expected = _cross_entropy(blocks_BT)(slice(None), logits.flatten(0, 1))
    expected.backward()

    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert set(gradients) == set(leaves)
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert gradients[key].dtype == torch.float32
        assert (gradients[key] - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), key


def test_an_expert_that_no_token_chose_has_no_gradient(folder: Path, blocks_BT: torch.Tensor) -> None:
    trained = _trained(Student.teacher(open_source(folder)), Scope.all_experts())
    one_token = blocks_BT[:1, :1]
    _, gradients = streamed_gradients(trained.streamed(None), one_token, _cross_entropy(one_token))
    top_k = trained.student.spec.top_k
    for layer in range(2):
        for name in ("gate_up.weight", "down.weight"):
            assert int((gradients[name, layer].flatten(1) != 0).any(1).sum()) == top_k


class _CountProducts(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return operation(*args, **(kwargs or {}))


def test_experts_that_are_not_trained_cost_no_product(folder: Path, blocks_BT: torch.Tensor) -> None:
    student = Student.teacher(open_source(folder))
    tokens_BT = blocks_BT[:4]  # a layer takes them at once
    counts = []
    for scope in (Scope.routers(), Scope.most_used(1), Scope.most_used(2)):
        model = _trained(student, scope).streamed(None)
        with _CountProducts() as products:
            streamed_gradients(model, tokens_BT, _cross_entropy(tokens_BT))
        counts.append(products.n)
    # two layers, two matrices of each trained expert, all of which some token chose
    assert [count - counts[0] for count in counts] == [0, 4, 8]


def test_gradients_in_bfloat16_point_the_same_way(folder: Path, blocks_BT: torch.Tensor) -> None:
    trained = _trained(Student.teacher(open_source(folder)), Scope.all_experts())
    exact, rounded = (
        streamed_gradients(trained.streamed(None), blocks_BT, _cross_entropy(blocks_BT), dtype)[1]
        for dtype in (torch.float32, torch.bfloat16)
    )
    for key, gradient in exact.items():
        assert rounded[key].dtype == torch.float32
        assert functional.cosine_similarity(gradient.flatten(), rounded[key].flatten(), dim=0) > 0.9, key


def test_router_logit_matching_equals_its_definition(folder: Path, blocks_BT: torch.Tensor) -> None:
    """Against two stock models; one of the student's experts stands for two of the teacher's."""
    source = open_source(folder)
    layers = (LayerMap(0, ((1,), (0, 2), (5,), (6,))), LayerMap(1, ((7,), (4,), (3,), (2,))))
    student = Student(source, ExpertMap(source.spec.n_experts, layers))
    routers = {(Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float() * 0.9) for layer in (0, 1)}
    objective = RouterLogitMatching(StreamedModel(Student.teacher(source)), student)
    chosen = [3, 1, 9]
    loss = objective.of_step(StreamedModel(student), blocks_BT, chosen, 6)  # half of the step's blocks
    total, gradients = streamed_gradients(
        StreamedModel(student, trainable=routers), blocks_BT[chosen], None, router_loss=loss.of_routers
    )

    teacher, stock = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    logits: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", stock)):
        for layer, module in enumerate(model.model.layers):
            if name == "student":
                kept = [group[0] for group in layers[layer].groups]
                module.mlp.gate.weight = nn.Parameter(routers[Role.ROUTER, layer].detach().clone())
                module.mlp.gate.num_experts = module.mlp.experts.num_experts = len(kept)
                module.mlp.experts.gate_up_proj = nn.Parameter(module.mlp.experts.gate_up_proj[kept].detach())
                module.mlp.experts.down_proj = nn.Parameter(module.mlp.experts.down_proj[kept].detach())
            module.mlp.gate.register_forward_hook(lambda _m, _i, out, name=name: logits[name].append(out[0]))
        model(blocks_BT[chosen], use_cache=False)
    expected = torch.zeros(())
    for layer in (0, 1):
        kept = [group[0] for group in layers[layer].groups]
        wanted = logits["teacher"][layer].detach()[:, kept]
        expected = expected + (logits["student"][layer] - wanted).square().mean() / 2 * (3 / 6)
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-4)
    for layer, module in enumerate(stock.model.layers):
        wanted = module.mlp.gate.weight.grad
        assert (gradients[Role.ROUTER, layer] - wanted).norm() < 1e-4 * wanted.norm()

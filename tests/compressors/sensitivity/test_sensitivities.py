"""Compares the sensitivities of the backward pass with autograd on stock transformers by the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.predictions.next_token import draw_tokens, random_numbers
from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.sensitivity import Candidate, UnitPlan, ggml_quantizer
from compressors.sensitivity.gathering import gather_sensitivities
from compressors.sensitivity.matrices import Sensitivities
from compressors.sensitivity.measuring import measured_table
from tests.altered import EMBEDDING_SCALE, LOGIT_DIVISOR, with_factors

_SEED = 7
_ATTENTION = {Role.QUERY: "q_proj", Role.KEY: "k_proj", Role.VALUE: "v_proj", Role.ATTENTION_OUTPUT: "o_proj"}


@pytest.fixture(scope="module", params=["fine", "coarse", "olmoe"])
def folder(
    request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two layers of each model."""
    return toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model=request.param)


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """Ten blocks: more than a layer takes at once."""
    return torch.from_numpy(heldout_tokens[: 10 * 48].reshape(10, 48))


@pytest.fixture(scope="module")
def found(folder: Path, blocks_BT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Sensitivities:
    """The sensitivities from the streamed pass."""
    student = Student.teacher(open_source(folder))
    return gather_sensitivities(student, blocks_BT, tmp_path_factory.mktemp("found"), seed=_SEED)


class _Experts(nn.Module):
    """A layer's experts written out one by one, so that autograd sees every output."""

    def __init__(self, fused: Any, seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]], prefix: str) -> None:
        super().__init__()
        self.fused, self.seen, self.prefix = fused, seen, prefix

    def forward(self, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in range(len(self.fused.down_proj)):
            tokens, slots = (chosen_TK == expert).nonzero(as_tuple=True)
            inputs = hidden_TD[tokens]
            gate_matrix, up_matrix = self.fused.gate_up_proj[expert].chunk(2)
            gate, up = inputs @ gate_matrix.T, inputs @ up_matrix.T
            hidden = functional.silu(gate) * up
            down = hidden @ self.fused.down_proj[expert].T
            for name, x, y in (("gate", inputs, gate), ("up", inputs, up), ("down", hidden, down)):
                y.retain_grad()
                self.seen[f"{self.prefix}.{name}.{expert}"] = [(x, y)]
            output_TD = output_TD.index_add(0, tokens, down * gates_TK[tokens, slots][:, None])
        return output_TD


class _Reference:
    """Stock transformers, one backward pass over everything."""

    def __init__(self, folder: Path, blocks_BT: torch.Tensor) -> None:
        self.stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for index, layer in enumerate(self.stock.model.layers):
            for role, name in _ATTENTION.items():
                layer.get_submodule(f"self_attn.{name}").register_forward_hook(self._keep(f"{index}.{role}"))
            layer.mlp.experts = _Experts(layer.mlp.experts, self.seen, str(index))
        self.stock.model.embed_tokens.register_forward_hook(self._keep("embedding"))
        self.stock.lm_head.register_forward_hook(self._keep("head"))
        logits_NV = self.stock(blocks_BT, use_cache=False).logits.flatten(0, 1)
        drawn_N = draw_tokens(logits_NV.detach(), random_numbers((_SEED,), len(logits_NV)))
        logits_NV.log_softmax(-1).gather(1, drawn_N[:, None]).sum().backward()
        self.n_tokens = blocks_BT.numel()

    def squares(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared gradients of the outputs over all tokens, and inputs over those that were there."""
        inputs, outputs = self.seen[name][0]
        assert outputs.grad is not None
        inputs, gradients = inputs.flatten(0, -2).detach(), outputs.grad.flatten(0, -2)
        return gradients.square().sum(0) / self.n_tokens, inputs.square().sum(0) / max(1, len(inputs))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            self.seen[name] = [(inputs[0], output)]

        return hook


@pytest.fixture(scope="module")
def reference(folder: Path, blocks_BT: torch.Tensor) -> _Reference:
    return _Reference(folder, blocks_BT)


def _assert_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.dtype == torch.float32, what
    assert found.shape == expected.shape, what
    assert (found - expected).norm() <= 1e-3 * expected.norm(), what


def test_every_matrix_has_the_squares_that_autograd_gives(found: Sensitivities, reference: _Reference) -> None:
    for layer in range(2):
        for role in _ATTENTION:
            rows, columns = reference.squares(f"{layer}.{role}")
            _assert_near(found.of(role, layer).rows_MPO[0, 0], rows, f"{role} {layer}")
            _assert_near(found.of(role, layer).columns_MPI[0, 0], columns, f"{role} {layer}")
        for role, name in ((Role.EXPERT_GATE, "gate"), (Role.EXPERT_UP, "up"), (Role.EXPERT_DOWN, "down")):
            sensitivity = found.of(role, layer)
            for expert in range(len(sensitivity.rows_MPO)):
                rows, columns = reference.squares(f"{layer}.{name}.{expert}")
                _assert_near(sensitivity.rows_MPO[expert, 0], rows, f"{role} {layer}.{expert}")
                _assert_near(sensitivity.columns_MPI[expert, 0], columns, f"{role} {layer}.{expert}")


def test_embedding_and_head_have_their_moments(
    found: Sensitivities, reference: _Reference, blocks_BT: torch.Tensor
) -> None:
    vocabulary = found.vocabulary
    _, embedded = reference.seen["embedding"][0]
    inputs, logits = reference.seen["head"][0]
    assert embedded.grad is not None
    gradient_ND, inputs_ND = embedded.grad.flatten(0, 1), inputs.detach().flatten(0, 1)
    _assert_near(vocabulary.embedding_gradient_moments, gradient_ND.T @ gradient_ND / 480, "G G^T")
    _assert_near(vocabulary.head_input_moments, inputs_ND.T @ inputs_ND / 480, "h h^T")
    probability_NV = logits.detach().flatten(0, 1).softmax(-1)
    _assert_near(vocabulary.head_rows_V, (probability_NV * (1 - probability_NV)).mean(0), "p (1 - p)")
    by_row = torch.stack(
        [
            gradient_ND[blocks_BT.flatten() == token].square().sum() / 480
            for token in range(len(vocabulary.lookup_rows_V))
        ]
    )
    _assert_near(vocabulary.lookup_rows_V, by_row, "lookups")
    _assert_near(vocabulary.lookup_columns_D, gradient_ND.square().mean(0) / gradient_ND.square().sum(1).mean(), "G^2")
    # the drawn tokens' residuals have the mean that kappa states
    drawn = logits.grad.flatten(0, 1).square().sum(-1)
    assert float(vocabulary.kappa) == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 480**0.5)


def test_errors_of_scaled_embeddings_and_heads_are_scaled_too(
    toy_checkpoint: Callable[..., Path], blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1, model="olmoe")
    checkpoints = (open_source(folder), with_factors(folder, tmp_path / "with factors"))
    plain, scaled = (
        gather_sensitivities(Student.teacher(checkpoint), blocks_BT[:2], tmp_path / name, seed=_SEED)
        for checkpoint, name in zip(checkpoints, ("plain", "scaled"), strict=True)
    )
    of_lookups, of_head = EMBEDDING_SCALE**2, 1 / LOGIT_DIVISOR**2
    torch.testing.assert_close(scaled.vocabulary.lookup_rows_V, of_lookups * plain.vocabulary.lookup_rows_V)
    moments = (of.vocabulary.embedding_gradient_moments for of in (scaled, plain))
    torch.testing.assert_close(next(moments), of_lookups * next(moments))
    torch.testing.assert_close(scaled.vocabulary.head_rows_V, of_head * plain.vocabulary.head_rows_V)
    torch.testing.assert_close(scaled.vocabulary.kappa, of_head * plain.vocabulary.kappa)
    torch.testing.assert_close(scaled.vocabulary.head_input_moments, plain.vocabulary.head_input_moments)


def test_the_diagonal_form_predicts_what_the_definition_says(
    found: Sensitivities, reference: _Reference, blocks_BT: torch.Tensor
) -> None:
    """1/2 E[(sum_oj G_o dW_oj x_j)^2], token by token, for errors of random signs."""
    generator = torch.Generator().manual_seed(3)

    def predicted(role: Role, layer: int | None, errors_MOI: torch.Tensor) -> float:
        sensitivity = found.of(role, layer)
        every = torch.arange(errors_MOI.shape[1])
        return sum(
            0.5 * float((sensitivity.weights(matrix, every) * error.square()).sum())
            for matrix, error in enumerate(errors_MOI)
        )

    def defined(names: list[str], errors_MOI: torch.Tensor) -> float:
        total = 0.0
        for name, error_OI in zip(names, errors_MOI, strict=True):
            inputs, outputs = reference.seen[name][0]
            assert outputs.grad is not None
            products = (inputs.detach().flatten(0, -2) @ error_OI.T) * outputs.grad.flatten(0, -2)
            total += 0.5 * float(products.sum(-1).square().sum()) / reference.n_tokens
        return total

    n_experts = len(found.of(Role.EXPERT_DOWN, 1).rows_MPO)
    tensors: dict[tuple[Role, int | None], list[str]] = {(role, 1): [f"1.{role}"] for role in _ATTENTION}
    tensors[Role.EXPERT_GATE, 0] = [f"0.gate.{expert}" for expert in range(n_experts)]
    tensors[Role.EXPERT_DOWN, 1] = [f"1.down.{expert}" for expert in range(n_experts)]
    for (role, layer), names in tensors.items():
        sensitivity = found.of(role, layer)
        size = (len(names), sensitivity.rows_MPO.shape[-1], sensitivity.columns_MPI.shape[-1])
        draws = [torch.randn(size, generator=generator) * 1e-3 for _ in range(8)]
        by_definition = np.mean([defined(names, errors) for errors in draws])
        assert np.mean([predicted(role, layer, errors) for errors in draws]) == pytest.approx(by_definition, rel=0.5)


def test_a_tied_matrix_is_judged_by_both_of_its_uses(found: Sensitivities, reference: _Reference) -> None:
    vocabulary = found.vocabulary
    embedding = found.of(Role.TOKEN_EMBEDDING)
    rows = torch.tensor([0, 17, 300])
    lookup = vocabulary.lookup_rows_V[rows, None] * vocabulary.lookup_columns_D
    head = vocabulary.head_rows_V[rows, None] * vocabulary.head_columns_D
    if found.tied:
        torch.testing.assert_close(embedding.weights(0, rows), lookup + head)
        torch.testing.assert_close(embedding.weights(0, rows, routed_only=True), lookup)
    else:
        torch.testing.assert_close(embedding.weights(0, rows), lookup)
        torch.testing.assert_close(found.of(Role.HEAD).weights(0, rows), head)
        assert not found.of(Role.HEAD).weights(0, rows, routed_only=True).any()


def test_a_table_is_completed_without_measuring_again(folder: Path, found: Sensitivities) -> None:
    def unit(*candidates: Candidate) -> UnitPlan:
        return UnitPlan("head", ("output.weight",), ((Role.HEAD, None),), candidates)

    def again(*_values: object) -> torch.Tensor:
        raise AssertionError("the type was measured before")

    student = Student.teacher(open_source(folder))
    fine, coarse = (ggml_quantizer(one) for one in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0))
    few, many = Candidate("Q4_0", 18, coarse), Candidate("Q8_0", 34, fine)
    whole = measured_table(student, [unit(few, many)], found, {})
    usual = measured_table(student, [unit(few, many).without({"Q4_0"})], found, {})
    assert [option.choice for option in usual.units[0].options] == ["Q8_0"]
    assert measured_table(student, [unit(few, replace(many, quantize=again))], found, {}, known=usual) == whole


def test_memory_and_a_second_run_change_no_bit(folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    student = Student.teacher(open_source(folder))
    done: list[int] = []
    limits = (None, MemoryLimit(1, tmp_path / "spill"), MemoryLimit(10**11, tmp_path / "spill"))
    for number, limit in enumerate(limits):
        target = tmp_path / str(number)
        gather_sensitivities(student, blocks_BT, target, seed=_SEED, limit=limit, progress=done.append)
        for file in sorted(target.iterdir()):
            assert file.read_bytes() == (tmp_path / "0" / file.name).read_bytes(), file.name
    assert done == [1] * 4 * len(limits)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer-003.safetensors cannot be read"):
        Sensitivities(tmp_path, True).of(Role.QUERY, 3)

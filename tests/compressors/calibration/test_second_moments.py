"""Second moments from stored layer inputs are those of a whole forward pass, whatever the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressors.calibration import second_moments
from compressors.calibration.layer_inputs import LayerInputs, write_layer_inputs
from compressors.calibration.second_moments import Moments, SecondMoments
from compressors.calibration.splits import read_splits, tokenize
from compressors.model.description.roles import Role
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student

_CLOSE = 0.01  # of the norm: layer inputs and what reaches experts are kept in 16 bits


class _Definition:
    """The sums of a whole pass, by definition: every row that enters every matrix, in float64."""

    def __init__(self, student: Student, tokens_BT: torch.Tensor) -> None:
        self._student = student
        self.totals: dict[tuple[str, int], torch.Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}
        model = StreamedModel(student)
        (states,) = model.stream([TokenGroup(tokens_BT, [self._observe])])
        rows = states.read(slice(0, len(states))).flatten(0, 1).double()
        variances = rows.square().mean(1, keepdim=True)
        norm = student.tensor(Role.FINAL_NORM).double()
        self._add("head", 0, rows / (variances + student.spec.rms_norm_eps).sqrt() * norm)

    def _add(self, what: str, layer: int, rows: torch.Tensor) -> None:
        rows = rows.flatten(0, -2).double()
        self.totals[what, layer] = self.totals.get((what, layer), 0.0) + rows.T @ rows
        self.counts[what, layer] = self.counts.get((what, layer), 0) + len(rows)

    @contextmanager
    def _observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        handles = [
            layer.get_submodule(f"self_attn.{name}").register_forward_pre_hook(
                lambda _module, inputs, what=name: self._add(what, index, inputs[0])
            )
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]
        if not self._student.spec.layers[index].routed:
            yield
        else:
            experts = layer.get_submodule("mlp.experts")

            def look(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                rows_TD, chosen_TK = inputs[0], inputs[1]
                self._add("experts", index, rows_TD)
                for expert in chosen_TK.unique().tolist():
                    self._add(f"gate_up {expert}", index, rows_TD[(chosen_TK == expert).any(1)])

            handles.append(experts.register_forward_pre_hook(look))
            experts.observer = lambda expert, _gates, hidden_nF, _outputs: self._add(  # type: ignore[assignment]
                f"down {expert}", index, hidden_nF
            )
            yield
            del experts.observer
        for handle in handles:
            handle.remove()

    def agrees(self, what: str, layer: int, found: Moments) -> bool:
        expected = self.totals[what, layer] / self.counts[what, layer]
        assert found.n_tokens == self.counts[what, layer], what
        return bool((found.mean_NN - expected).norm() < _CLOSE * expected.norm())


@pytest.fixture(scope="module")
def tokens_BT(fine_folder: Path, calibration_folder: Path) -> torch.Tensor:
    """Three blocks of 512 tokens; the trained models share one vocabulary."""
    return tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(3).tokens_BT


def _expert(student: Student, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = (student.expert(role, layer, expert) for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
    return gate, up


@pytest.mark.parametrize("model", ["fine", "coarse", "olmoe"])
def test_they_are_those_of_a_whole_pass(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, tokens_BT: torch.Tensor, model: str
) -> None:
    student = Student.teacher(open_source(toy_checkpoint(tmp_path, n_layers=2, model=model)))
    inputs = write_layer_inputs(StreamedModel(student), tokens_BT, tmp_path / "inputs")
    expected = _Definition(student, tokens_BT)
    moments = SecondMoments(student, inputs)
    assert expected.agrees("head", 0, moments.head())
    for index in range(2):
        layer = moments.layer(index)
        for name, role in (("q_proj", Role.QUERY), ("k_proj", Role.KEY), ("v_proj", Role.VALUE)):
            assert expected.agrees(name, index, layer.matrices[student.spec.tensor(role, index).input_role])
        assert expected.agrees("o_proj", index, layer.matrices[Role.ATTENTION_OUTPUT])
        assert layer.experts is not None
        assert expected.agrees("experts", index, layer.experts.all_tokens)
        for expert in range(0, student.spec.n_experts, 5):
            # a token whose last choice is a close call may choose otherwise after its state was rounded
            found = layer.experts.gate_up(expert), layer.experts.down(expert, *_expert(student, index, expert))
            for name, sums in zip(("gate_up", "down"), found, strict=True):
                what = f"{name} {expert}", index
                assert abs(sums.n_tokens - expected.counts[what]) <= 0.02 * expected.counts[what] + 2
                if sums.n_tokens == expected.counts[what]:
                    assert expected.agrees(*what, sums)


def test_a_student_s_own_layers_and_experts_are_looked_at(
    float32_toy: Source, tmp_path: Path, tokens_BT: torch.Tensor
) -> None:
    """Fewer experts in one layer, none in the other: the sums follow the student's numbering."""
    kept = tuple((expert,) for expert in (7, 3, 11, 4, 30, 9))
    student = Student(float32_toy, ExpertMap(32, (LayerMap(0, kept), LayerMap(1, ()))))
    inputs = write_layer_inputs(StreamedModel(student), tokens_BT[:1], tmp_path)
    expected = _Definition(student, tokens_BT[:1])
    moments = SecondMoments(student, inputs)
    layer, last = moments.layer(0), moments.layer(1)
    assert layer.experts is not None and last.experts is None
    assert expected.agrees("experts", 0, layer.experts.all_tokens)
    assert expected.agrees("q_proj", 1, last.matrices[Role.QUERY])
    assert expected.agrees("o_proj", 1, last.matrices[Role.ATTENTION_OUTPUT])
    assert sum(layer.experts.gate_up(expert).n_tokens for expert in range(6)) == tokens_BT[:1].numel() * 4
    assert layer.experts.gate_up(6).n_tokens == 0 and not layer.experts.gate_up(6).mean_NN.any()


def test_threads_change_no_bit(float32_toy: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student.teacher(float32_toy)
    tokens_BT = torch.randint(0, 4096, (7, 64), generator=torch.Generator().manual_seed(3))
    write_layer_inputs(StreamedModel(student), tokens_BT, tmp_path)
    monkeypatch.setattr(second_moments, "TOKENS_AT_ONCE", 128)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        moments = SecondMoments(student, LayerInputs(tmp_path), threads=threads)
        layer = moments.layer(1)
        assert layer.experts is not None
        found.append((*layer.matrices.values(), layer.experts.all_tokens, moments.head()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one.mean_NN, three.mean_NN)

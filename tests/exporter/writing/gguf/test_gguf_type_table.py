"""The table of types against files' own sizes, and its sampled errors against those of all weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.calibration.statistics import Importance, StatisticsCollector, importance
from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import dequantize_rows
from compressors.quantize.kernels import quantize_rows
from compressors.sensitivity import TypeTable, allocate, default_table
from compressors.sensitivity.gathering import gather_sensitivities
from compressors.sensitivity.matrices import Sensitivities
from exporter.writing.gguf.container import aligned
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.measured_types import gguf_type_table
from exporter.writing.gguf.type_table import ALLOCATED_TYPES, plan_gguf_units, weights_of_a_token

_T = GGMLQuantizationType
_FEW = (_T.Q8_0, _T.Q5_0, _T.Q4_0, _T.Q3_K)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Student:
    """Two layers of the model with 32 experts."""
    return Student.teacher(open_source(toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2)))


@pytest.fixture(scope="module")
def known(
    student: Student, heldout_tokens: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sensitivities, Importance]:
    """Sensitivities and the importance matrix, over 1,024 tokens."""
    tokens_BT = torch.from_numpy(heldout_tokens[: 8 * 128].reshape(8, 128))
    collector = StatisticsCollector(student.spec)
    StreamedModel(student).stream([TokenGroup(tokens_BT, [collector.observe])])
    layers = [collector.take(layer) for layer in range(student.spec.n_layers)]
    sensitivities = gather_sensitivities(student, tokens_BT, tmp_path_factory.mktemp("sensitivities"))
    return sensitivities, importance(layers, ExpertMap.identity(student.spec), student.spec)


@pytest.fixture(scope="module")
def table(student: Student, known: tuple[Sensitivities, Importance]) -> TypeTable:
    """The table from sampled rows."""
    return gguf_type_table(student, *known, _FEW)


def _quantized(student: Student, mix: str) -> dict[str, int]:
    """Bytes of the file's tensors that are quantized, padding included."""
    tensors = plan_tensors(student.spec, mix)
    return {tensor.name: aligned(tensor.n_bytes) for tensor in tensors if tensor.ggml_type is not _T.F32}


def test_units_are_the_quantized_tensors_in_the_files_order_with_their_bytes(student: Student) -> None:
    units = {
        plan.name: {candidate.choice: candidate.n_bytes for candidate in plan.candidates}
        for plan in plan_gguf_units(student.spec, [*ALLOCATED_TYPES, _T.BF16])
    }
    for mix in ("BF16", "Q8_0", "Q5_0"):
        tensors = plan_tensors(student.spec, mix)
        expected = {tensor.name: tensor for tensor in tensors if tensor.ggml_type is not _T.F32}
        assert list(units) == list(expected)
        for name, tensor in expected.items():
            assert units[name][tensor.ggml_type.name] == aligned(tensor.n_bytes), name
    assert "Q4_K" not in units["blk.0.ffn_down_exps.weight"], "its rows are 128 long"


def test_an_untied_head_is_a_unit_and_a_dense_model_has_one_matrix_a_layer(
    olmoe_folder: Path, fine_folder: Path
) -> None:
    spec = open_source(olmoe_folder).spec
    assert [plan.name for plan in plan_gguf_units(spec)][:2] == ["token_embd.weight", "output.weight"]
    # all of a dense model's matrices are of one expert
    dense = read_spec(fine_folder).with_experts(1)
    names = [plan.name for plan in plan_gguf_units(dense)]
    assert "blk.2.ffn_up.weight" in names
    sizes = {plan.name: plan.candidates[0].n_bytes for plan in plan_gguf_units(dense)}
    assert sizes["blk.2.ffn_up.weight"] == dense.expert_width * dense.hidden_size * 34 // 32


def test_sampled_errors_are_near_those_of_all_weights(
    student: Student, known: tuple[Sensitivities, Importance], table: TypeTable
) -> None:
    exact = gguf_type_table(student, *known, (_T.Q8_0, _T.Q4_0), n_weights=None)
    ratios = [
        math.log(sampled.order.total / option.order.total)
        for unit, others in zip(exact.units, table.units, strict=True)
        for option, sampled in ((option, others.option(option.choice)) for option in unit.options)
    ]
    assert np.std(ratios) < 0.02
    assert abs(np.mean(ratios)) < 0.01


def test_all_weights_give_the_sum_by_definition(student: Student, known: tuple[Sensitivities, Importance]) -> None:
    sensitivities, weights = known
    exact = gguf_type_table(student, *known, (_T.Q8_0,), n_weights=None)
    found = {unit.name: unit.options[0].order.total for unit in exact.units}
    for role, layer in ((Role.EXPERT_DOWN, 1), (Role.QUERY, 0)):
        sensitivity = sensitivities.of(role, layer)
        total = 0.0
        for matrix in range(len(sensitivity.rows_MPO)):
            values = student.expert(role, layer, matrix) if role.is_expert else student.tensor(role, layer)
            columns = weights[role, layer][matrix] if role.is_expert else weights[role, layer]
            stored = quantize_rows(values, _T.Q8_0, columns, name="matrix")
            error = torch.from_numpy(dequantize_rows(stored, _T.Q8_0, values.shape[1])) - values.float()
            weighted = sensitivity.rows_MPO[matrix, 0][:, None] * sensitivity.columns_MPI[matrix, 0] * error.square()
            total += 0.5 * float(weighted.sum(dtype=torch.float64))
        assert found[student.spec.tensor(role, layer).gguf.name.format(layer=layer)] == pytest.approx(total, rel=1e-4)


def test_threads_do_not_matter_and_feedback_leaves_less(
    student: Student, known: tuple[Sensitivities, Importance], table: TypeTable
) -> None:
    assert gguf_type_table(student, *known, _FEW, threads=3) == table
    with_feedback = gguf_type_table(student, *known, _FEW, feedback=True)
    types = dict.fromkeys((unit.name for unit in table.units), "Q4_0")
    assert 0.2 < with_feedback.order(types).total / table.order(types).total < 0.8


def test_each_type_is_tried_with_one_thread_of_torch(student: Student, known: tuple[Sensitivities, Importance]) -> None:
    """A sum's last bits depend on their number, and so many times as many threads would wait for the cores."""
    found: set[int] = set()

    def watch(values_RN: torch.Tensor, _importance_N: torch.Tensor | None, _name: str) -> torch.Tensor:
        found.add(torch.get_num_threads())
        return values_RN

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gguf_type_table(student, *known, (_T.Q8_0,), quantizers={_T.Q8_0: watch}, threads=2)
        assert found == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_decoding_costs_what_a_token_is_multiplied_with(student: Student) -> None:
    plans = plan_gguf_units(student.spec, [_T.Q8_0], decode_cost=lambda _type, n_weights: float(n_weights))
    used = {plan.name: plan.candidates[0].seconds for plan in plans}
    spec = student.spec
    assert used["blk.0.ffn_down_exps.weight"] == spec.top_k * spec.expert_width * spec.hidden_size
    assert used["blk.1.attn_q.weight"] == spec.layers[1].mixer.width * spec.hidden_size
    assert used["token_embd.weight"] == spec.vocab_size * spec.hidden_size  # it is the head


def test_a_token_is_multiplied_with_the_whole_feed_forward_of_a_dense_model(student: Student) -> None:
    dense = student.spec.with_experts(1)
    used = {tensor.name: weights_of_a_token(dense, tensor) for tensor in plan_tensors(dense, "Q8_0")}
    assert used["blk.0.ffn_down.weight"] == dense.expert_width * dense.hidden_size


def test_defaults_order_types_as_measuring_does(student: Student, table: TypeTable) -> None:
    default = default_table(student.spec, plan_gguf_units(student.spec, _FEW))
    assert [unit.name for unit in default.units] == [unit.name for unit in table.units]
    for unit, measured in zip(default.units, table.units, strict=True):
        costs = {option.choice: option.order.total for option in unit.options}
        by_measuring = sorted(measured.options, key=lambda option: option.order.total)
        assert sorted(costs, key=costs.__getitem__) == [option.choice for option in by_measuring]
    exact = default_table(student.spec, plan_gguf_units(student.spec, [_T.MXFP4], quantizers={_T.MXFP4: None}))
    assert all(unit.option("MXFP4").order.total == 0 for unit in exact.units), "the files hold the weights so"
    limit = sum(_quantized(student, "Q4_0").values())
    assert allocate(default, limit).n_bytes <= limit

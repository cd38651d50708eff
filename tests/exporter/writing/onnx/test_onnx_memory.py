"""The predicted memory is an upper bound on what ONNX Runtime takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.onnx.encodings import ENCODINGS, PRESETS, onnx_units
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.memory import predict_runtime_bytes, unit_runtime_bytes
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.writing.onnx.described import attention, described_layer, random_folder, with_layers
from validate.runtimes.measure import measure_artifact

_BITS_WITH_SCALES: Mapping[ProductInputs, int] = {"float32": 5, "int8": 7}
"""Bits of a weight of 4 bits: its block's scale in float32 and, for int8 inputs, the packed scale and the sum."""


@pytest.mark.parametrize("encoding", [*PRESETS, "2@32", "8@32"])
def test_measured_peak_is_within_the_prediction(
    family_folder: Path, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64], encoding: str
) -> None:
    """Measures the presets, and files whose products all quantize their inputs."""
    student = Student.teacher(Checkpoint(family_folder))
    encodings = {} if encoding in PRESETS else {unit.name: encoding for unit in onnx_units(student.spec)}
    preset = encoding if encoding in PRESETS else "Q4_0"
    write_onnx(student, preset, tmp_path, encodings=encodings, threads=1)
    for context in (64, 1024):
        cost = measure_artifact(
            "onnx", tmp_path, context=context, kv_type="f32", threads=2, prompt=heldout_tokens[:2048]
        )
        predicted = sum(predict_runtime_bytes(student.spec, preset, context, threads=2, encodings=encodings).values())
        assert 0 < cost.peak_rss_bytes - cost.base_rss_bytes <= predicted


def test_sinks_take_room_for_the_weights_of_all_columns(
    olmoe_folder: Path, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    heads, context = 16, 2048
    block = Routed(4, 2, 32, Routing())
    layers = [described_layer(attention(n_heads=heads, window=16), block, 64, (Role.SINKS,)) for _ in range(2)]
    spec = replace(with_layers(Checkpoint(olmoe_folder).spec, *layers), context_length=context)
    folder = random_folder(spec, tmp_path, "F32")
    cost = measure_artifact("onnx", folder, context=context, kv_type="f32", threads=2, prompt=heldout_tokens % 96)
    predicted = predict_runtime_bytes(spec, "F32", context, threads=2)
    weights = 4 * heads * 512 * context
    assert weights < cost.peak_rss_bytes - cost.base_rss_bytes <= sum(predicted.values()) < 3 * weights


def test_cache_grows_with_the_context_and_weights_with_the_experts(fine_folder: Path) -> None:
    spec = Checkpoint(fine_folder).spec
    short, long = (predict_runtime_bytes(spec, "Q4_0", context, threads=2) for context in (512, 1024))
    assert long["kv_cache"] - short["kv_cache"] == 2 * 6 * 4 * 32 * 4 * 512  # K and V, layers, heads, width, float32
    dropped = 6 * 16 * spec.layers[0].expert_parameters
    for inputs, bits in _BITS_WITH_SCALES.items():
        more, fewer = (
            predict_runtime_bytes(experts, "Q4_0", 512, threads=2, inputs=inputs)
            for experts in (spec, spec.with_experts(16))
        )
        assert more["weights"] - fewer["weights"] == pytest.approx(dropped * bits / 8, rel=0.05)


@pytest.mark.parametrize("inputs", ["float32", "int8"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_unit_takes_the_bytes_that_another_encoding_saves(
    family_folder: Path, inputs: ProductInputs, is_tied: bool
) -> None:
    spec = replace(Checkpoint(family_folder).spec, tied_embeddings=is_tied)
    check_unit_bytes(spec, inputs)


def check_unit_bytes(spec: ModelSpec, inputs: ProductInputs) -> None:
    """Checks what each encoding of a unit takes beside the file against the difference that it makes to the whole."""

    def beside_file(encodings: Mapping[str, str]) -> int:
        predicted = predict_runtime_bytes(spec, "Q4_0", 64, threads=1, encodings=encodings, inputs=inputs)
        return predicted["weights"] - plan_tensors(spec, "Q4_0", encodings, inputs).data_bytes

    for unit in onnx_units(spec):
        if unit.layer in (None, 1):
            of_unit = {
                name: unit_runtime_bytes(spec, unit, replace(ENCODINGS[name], inputs=inputs)) - n_bytes
                for name, n_bytes in unit.encodings.items()
            }
            whole = {name: beside_file({unit.name: name}) for name in unit.encodings}
            for name in unit.encodings:
                assert whole[name] - whole["F32"] == of_unit[name] - of_unit["F32"], (unit.name, name)


def test_context_beyond_the_model_is_refused(fine_folder: Path) -> None:
    spec = replace(Checkpoint(fine_folder).spec, context_length=100)
    with pytest.raises(InputError, match="101"):
        predict_runtime_bytes(spec, "F32", 101, threads=2)

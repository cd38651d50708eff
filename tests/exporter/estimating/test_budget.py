"""Compares the prediction for an artifact, line by line, with formulas written out here."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressors.model.errors import InputError
from compressors.model.files.gguf.kv_types import KvType
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.estimating.budget import predict, runtime_reserve
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import BudgetChoice, FileChoice
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.measure import measure_base


def _cached_values(folder: Path) -> int:
    """Values of one token in the cache: layers, key and value, heads, values of a head."""
    spec = open_source(folder).spec
    return sum(layer.mixer.cached_values for layer in spec.layers)


def _predict(
    folder: Path, artifact: str, weight_type: str, *, context: int = 1024, kv_type: KvType = "f16", threads: int = 1
) -> Prediction:
    budget = BudgetChoice(bytes=1, kind="total", context=context, kv_type=kv_type)
    source = open_source(folder)
    return predict(artifact, source, "tiny", source.spec, FileChoice(mix=weight_type), budget, threads)


def test_the_total_is_the_sum_of_the_lines_and_the_file_is_not_one() -> None:
    prediction = Prediction(file=1, weights=10, kv_cache=200, compute=3000, reserve=40000)
    assert prediction.total == 43210
    assert (prediction.counted("total"), prediction.counted("file")) == (43210, 1)


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_0"])
def test_the_predicted_gguf_is_the_written_one(family_folder: Path, tmp_path: Path, weight_type: str) -> None:
    write_gguf(Student.teacher(open_source(family_folder)), weight_type, tmp_path / "a.gguf", name="tiny", threads=1)
    assert _predict(family_folder, "gguf", weight_type).file == (tmp_path / "a.gguf").stat().st_size


def test_the_predicted_onnx_is_the_written_one(family_folder: Path, tmp_path: Path) -> None:
    write_onnx(Student.teacher(open_source(family_folder)), "Q4_0", tmp_path, threads=1)
    written = sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert _predict(family_folder, "onnx", "Q4_0").file == written


@pytest.mark.parametrize(("kv_type", "bytes_per_32"), [("f32", 128), ("f16", 64), ("q8_0", 34), ("q4_0", 18)])
def test_llama_cpp_s_cache_has_the_type_that_was_asked_for(
    family_folder: Path, kv_type: KvType, bytes_per_32: int
) -> None:
    prediction = _predict(family_folder, "gguf", "Q8_0", kv_type=kv_type)
    assert prediction.kv_cache == 1024 * _cached_values(family_folder) * bytes_per_32 // 32


@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
def test_onnx_runtime_s_cache_is_float32_whatever_was_asked_for(family_folder: Path, kv_type: KvType) -> None:
    assert _predict(family_folder, "onnx", "Q4_0", kv_type=kv_type).kv_cache == 1024 * _cached_values(family_folder) * 4


@pytest.mark.parametrize(("artifact", "bits"), [("gguf", 4.5), ("onnx", 7.0)])
def test_what_grows_with_what(fine_folder: Path, artifact: str, bits: float) -> None:
    """In memory ONNX's blocks of 32 have float32 scales, and two more numbers for int8 inputs."""
    weight_type = "Q4_0"
    small, large = (_predict(fine_folder, artifact, weight_type, context=context) for context in (512, 2048))
    assert large.kv_cache == 4 * small.kv_cache
    assert (large.file, large.weights, large.reserve) == (small.file, small.weights, small.reserve)
    assert large.compute >= small.compute
    source = open_source(fine_folder)
    pruned = predict(
        artifact,
        source,
        "tiny",
        source.spec.with_experts(16),
        FileChoice(mix=weight_type),
        BudgetChoice(bytes=1, kind="total", context=512, kv_type="f16"),
        1,
    )
    experts = 6 * 16 * 3 * 256 * 128
    assert 8 * (small.weights - pruned.weights) / experts == pytest.approx(bits, rel=0.05)
    assert pruned.kv_cache == small.kv_cache


@pytest.mark.parametrize(("artifact", "weight_type"), [("gguf", "BF16"), ("onnx", "F32")])
def test_no_line_is_missing(family_folder: Path, artifact: str, weight_type: str) -> None:
    prediction = _predict(family_folder, artifact, weight_type)
    assert prediction.weights >= 0.95 * prediction.file
    assert min(prediction.kv_cache, prediction.compute) > 1_000_000
    assert prediction.reserve == runtime_reserve(artifact)


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_the_reserve_is_the_runtime_s_own_memory_rounded_up(artifact: str) -> None:
    """Measured anew it differs by a page or two, hardly ever by a whole step of 8 MiB."""
    step = 8 * 2**20
    reserve = runtime_reserve(artifact)
    assert reserve % step == 0
    assert -step < reserve - measure_base(artifact) < 2 * step


def test_a_type_that_there_is_not_is_named(fine_folder: Path) -> None:
    for artifact in ("gguf", "onnx"):
        with pytest.raises(InputError, match="Q3_X"):
            _predict(fine_folder, artifact, "Q3_X")

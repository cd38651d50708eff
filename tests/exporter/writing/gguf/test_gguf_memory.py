"""The predicted memory against what a process that runs llama.cpp really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.config import read_spec
from compressors.model.sources.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.gguf.memory import predict_runtime_bytes
from exporter.writing.gguf.writer import write_gguf
from tests.altered import altered

_REPOSITORY = Path(__file__).parents[4]
_SMALL = 8 << 20  # bytes by which the prediction may exceed a model of a few MB: buffers that are not touched whole
_MEASURE = (
    "import dataclasses, json, pathlib, sys; from validate.runtimes.llama_cpp import measure;"
    "cost = measure(pathlib.Path(sys.argv[1]), context=int(sys.argv[2]), kv_type=sys.argv[3], threads=2,"
    " prompt_tokens=list(range(100, 1100, 7)));"
    "print(json.dumps(dataclasses.asdict(cost)))"
)


@pytest.fixture(scope="module")
def file(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "x.gguf"
    write_gguf(Student.teacher(Checkpoint(family_folder)), "Q4_0", path, name="x", threads=2)
    return path


@pytest.mark.parametrize(
    ("context", "kv_type"), [(512, "f16"), (2048, "f16"), (2048, "f32"), (2048, "q8_0"), (2048, "q4_0")]
)
def test_prediction_is_an_upper_bound_and_close(file: Path, family_folder: Path, context: int, kv_type: str) -> None:
    command = [sys.executable, "-c", _MEASURE, str(file), str(context), kv_type]
    cost = json.loads(subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True).stdout)
    taken = cost["peak_rss_bytes"] - cost["base_rss_bytes"]
    predicted = sum(predict_runtime_bytes(read_spec(family_folder), file.stat().st_size, context, kv_type).values())
    assert taken <= predicted <= max(1.25 * taken, taken + _SMALL)


def test_every_expert_and_every_layer_counts(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    lines = predict_runtime_bytes(spec, 1000, 300, "f16")
    assert lines["weights"] == 1000
    assert lines["kv_cache"] == 6 * 512 * 2 * 4 * 32 * 2  # 300 tokens are rounded up to 512
    assert predict_runtime_bytes(spec, 1000, 300, "q8_0")["kv_cache"] == lines["kv_cache"] // 2 * 34 // 32


def test_unknown_cache_types_are_refused(fine_folder: Path) -> None:
    with pytest.raises(InputError, match="--kv-type q3: no such type; choose one of f32, f16, q8_0, q4_0"):
        predict_runtime_bytes(read_spec(fine_folder), 1, 512, "q3")


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_heads_that_are_no_whole_blocks_of_a_quantized_cache_are_refused(fine_folder: Path, kv_type: str) -> None:
    shape = altered(read_spec(fine_folder), head_dim=48)
    with pytest.raises(UnsupportedError, match=f"--kv-type {kv_type}: .* blocks of 32, .* heads are 48 wide"):
        predict_runtime_bytes(shape, 1, 512, kv_type)

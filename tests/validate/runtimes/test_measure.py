"""Runtimes measured in processes of their own: their own memory, and how they fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compressors.model.errors import InputError, MoeExportError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.cost import Runs, RuntimeCost
from validate.runtimes.measure import RuntimeCrashError, measure_artifact, measure_base

_PROMPT = np.arange(1, 100)


def _measure(artifact: str, path: Path, context: int = 128) -> RuntimeCost:
    return measure_artifact(artifact, path, context=context, kv_type="f16", threads=1, prompt=_PROMPT)


def test_one_disturbed_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 11.0, 21.0, 21.5, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    runs = Runs()
    for _ in range(5):
        runs.done(100)
    assert (len(runs), runs.tokens_per_second) == (5, 200.0)


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_a_runtime_by_itself_needs_megabytes_but_not_torch_s(artifact: str) -> None:
    """Python with numpy has more than 10 MB; torch alone would add 150 MB."""
    assert 10_000_000 < measure_base(artifact) < 150_000_000


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Student:
    return Student.teacher(open_source(toy_checkpoint(tmp_path_factory.mktemp("measure"), n_layers=1)))


@pytest.fixture(scope="module")
def artifacts(student: Student, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    write_gguf(student, "BF16", folder / "model.gguf", name="toy", threads=1)
    write_onnx(student, "F32", folder / "onnx", threads=1)
    return {"gguf": folder / "model.gguf", "onnx": folder / "onnx"}


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_the_model_comes_on_top_of_the_runtime(artifact: str, artifacts: dict[str, Path], student: Student) -> None:
    cost = _measure(artifact, artifacts[artifact])
    experts = 32 * student.spec.layers[0].expert_parameters * {"gguf": 2, "onnx": 4}[artifact]
    assert cost.base_rss_bytes > 10_000_000
    assert cost.peak_rss_bytes - cost.base_rss_bytes > experts
    assert min(cost.load_seconds, cost.prefill_tokens_per_second, cost.decode_tokens_per_second) > 0


def test_a_file_that_is_no_gguf_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("This is not a model.")
    with pytest.raises(RuntimeCrashError) as refused:
        _measure("gguf", path)
    message = str(refused.value)
    assert message.startswith(f"the runtime of gguf failed: {path} cannot be loaded by llama.cpp")
    assert "\n" not in message
    assert isinstance(refused.value, MoeExportError)
    assert not isinstance(refused.value, InputError), "a runtime's failure is a finding, not a wrong flag"


def test_a_truncated_gguf_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = artifacts["gguf"].read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(RuntimeCrashError, match=r"the runtime of gguf failed: .*model\.gguf cannot be loaded"):
        _measure("gguf", path)


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("This is not a model.")
    with pytest.raises(RuntimeCrashError, match=r"the runtime of onnx failed: .*model\.onnx does not load"):
        _measure("onnx", tmp_path)


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_a_missing_file_is_named(artifact: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeCrashError, match=rf"the runtime of {artifact} failed: .*nowhere"):
        _measure(artifact, tmp_path / "nowhere")


def test_a_context_too_short_to_measure_is_refused(artifacts: dict[str, Path]) -> None:
    with pytest.raises(RuntimeCrashError, match="the runtime of gguf failed: measuring needs a context of at least"):
        _measure("gguf", artifacts["gguf"], context=8)


def test_the_peak_counts_memory_that_was_given_back() -> None:
    script = """
from validate.runtimes.cost import peak_rss_bytes
before = peak_rss_bytes()
block = b"x" * 100_000_000
del block
print(before, peak_rss_bytes())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert before < 100_000_000, "what the parent process had is not its own"
    assert 99_000_000 < after - before < 120_000_000


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("exit 0", "the runtime of gguf ended with code 0 without an answer"),
        ("echo no JSON", "the runtime of gguf ended with code 0 without an answer"),
        (
            "echo '/tmp/b/ggml.c:7: GGML_ASSERT(x) failed' >&2; kill -ABRT $$",
            "died with SIGABRT: ggml.c:7: GGML_ASSERT(x)",
        ),
        ("kill -ALRM $$", "the runtime of gguf did not finish a step in 30 s and was ended"),
    ],
    ids=["silent", "nonsense", "assertion", "time"],
)
def test_however_the_process_ends_it_is_told(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(f"#!/bin/sh\n{program}\n", encoding="ascii")
    runtime.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(runtime))
    with pytest.raises(RuntimeCrashError) as death:
        measure_base("gguf")
    assert message in str(death.value)

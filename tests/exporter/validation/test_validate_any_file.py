"""``moe-export validate`` on files that others wrote: the comparisons, the omitted ones, and the notes about them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from llama_cpp import llama_cpp as api
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.cli import main
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.gpu import MissingGpuError, check_gpu_layers, check_provider


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, heldout_folder: Path) -> Path:
    """Three chunks."""
    path = tmp_path_factory.mktemp("text") / "religion.txt"
    path.write_text((heldout_folder / "religion.txt").read_text(encoding="utf-8")[:6500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("original"), n_layers=1)


@pytest.fixture(scope="module")
def gguf_file(original: Path) -> Path:
    path = original.parent / "theirs.gguf"
    write_gguf(Student.teacher(open_source(original)), "F32", path, name="x", threads=1)
    return path


@pytest.fixture(scope="module")
def validate(text: Path) -> Callable[..., Result]:
    """Runs the command in this process: ``validate(path, original, *more arguments)``."""

    def run(path: Path, against: Path, *arguments: str) -> Result:
        command = ["validate", str(path), "--against", str(against), "--text", str(text), "--threads", "1"]
        return CliRunner().invoke(main, [*command, *arguments])

    return run


def _row(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    return dict(row)


def _other_notes(row: dict[str, Any]) -> list[str]:
    """The notes but one: this vocabulary's tokenizer normalizes text (NFC), which llama.cpp does not."""
    is_known = [note.startswith("llama.cpp cuts ") and "cafe\u0301" in note for note in row["notes"]]
    assert sum(is_known) == 1
    return [note for note, known in zip(row["notes"], is_known, strict=True) if not known]


def _padded(original: Path, folder: Path, size: int) -> Path:
    """The same checkpoint with rows of padding in its embedding, which is its head too."""
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    padding = embedding.mean(0, keepdim=True).expand(size - len(embedding), -1)
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, padding])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_padding_is_left_out_on_either_side(
    original: Path, gguf_file: Path, validate: Callable[..., Result], tmp_path: Path
) -> None:
    padded = _padded(original, tmp_path / "padded", 4160)
    write_gguf(Student.teacher(open_source(padded)), "F32", tmp_path / "padded.gguf", name="x", threads=1)
    plain = _row(validate(gguf_file, original, "--json"))
    assert _other_notes(plain) == []
    for path, against, sizes in (
        (gguf_file, padded, "4,096 tokens, the original's 4,160"),
        (tmp_path / "padded.gguf", original, "4,160 tokens, the original's 4,096"),
    ):
        row = _row(validate(path, against, "--json"))
        assert row["kld"]["mean"] == pytest.approx(plain["kld"]["mean"], abs=1e-5)
        assert row["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
        (note,) = _other_notes(row)
        assert sizes in note
        assert "padding" in note


def test_memory_and_speed_are_measured(original: Path, gguf_file: Path, validate: Callable[..., Result]) -> None:
    row = _row(validate(gguf_file, original, "--json"))
    assert row["peak_rss_bytes"] - row["base_rss_bytes"] > 0.9 * gguf_file.stat().st_size
    assert 0.9 * gguf_file.stat().st_size < row["buffers"]["weights"] < 1.1 * gguf_file.stat().st_size
    assert row["device_bytes"] is None
    assert min(row[f"{way}_tokens_per_second"] for way in ("prefill", "decode")) > 1
    shown = validate(gguf_file, original).stdout
    assert re.search(r"GGUF: [\d.]+ MB of memory with 512\s+tokens\s+of\s+context;", shown)


def test_loops_are_not_asked_of_files(original: Path, gguf_file: Path, validate: Callable[..., Result]) -> None:
    result = validate(gguf_file, original, "--require", "loops=0.1")
    assert result.exit_code == 2
    assert "--require: there is no loops; known are kld (" in result.stderr


def test_another_vocabulary_is_refused(
    original: Path, gguf_file: Path, validate: Callable[..., Result], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(original, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    result = validate(gguf_file, other)
    assert result.exit_code == 2
    assert re.search(r"error: token \d+ is 'Ġ(the|of)' in .*theirs\.gguf and 'Ġ(the|of)' in .*other", result.stderr)


def test_a_pruned_file_is_compared_without_routing(
    original: Path, validate: Callable[..., Result], tmp_path: Path
) -> None:
    source = open_source(original)
    student = Student(source, ExpertMap.keeping(32, [range(0, 32, 2)]))
    write_gguf(student, "Q8_0", tmp_path / "pruned.gguf", name="x", threads=1)
    row = _row(validate(tmp_path / "pruned.gguf", original, "--json"))
    assert row["kld"]["mean"] > 0.005
    assert row["routing"] is row["routing_overlap_vs_teacher"] is None
    (note,) = _other_notes(row)
    assert note.startswith("it has 16 experts in 1 layers, the original 32 in 1, and nothing says which they are")
    shown = validate(tmp_path / "pruned.gguf", original, "--require", "kld=0.001,top1=0.1", "--require", "routing=0.5")
    assert shown.exit_code == 4
    assert shown.stderr.splitlines() == [
        "failed: GGUF: routing overlap with the unquantized model: not measured (threshold 50.00 %)",
        f"failed: GGUF: mean divergence from the original: {row['kld']['mean']:.4f} (at most 0.0010)",
    ]
    assert re.search(r"Failed 2 of \d+ checks", shown.stdout)


def test_a_file_stands_for_the_original(
    original: Path, gguf_file: Path, validate: Callable[..., Result], tmp_path: Path
) -> None:
    """An ONNX folder as onnxruntime-genai names its graph, against a GGUF file in that file's own vocabulary."""
    folder = tmp_path / "genai"
    student = Student.teacher(open_source(original))
    write_onnx(student, "Q4_0", folder, threads=1)
    write_client_files(student, folder)
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    against_checkpoint = _row(validate(folder, original, "--json"))
    assert "weights were not compared" in against_checkpoint["notes"][0]
    against_file = json.loads(validate(folder, gguf_file, "--json").stdout)
    assert against_file["reference"] == {"name": str(gguf_file), "runtime": "llama.cpp"}
    (row,) = against_file["rows"]
    assert (row["band"], row["bits_per_weight"]) == ("4-bit", 4.5)
    assert row["kld"]["mean"] == pytest.approx(against_checkpoint["kld"]["mean"], rel=0.01)
    assert row["perplexity"] == pytest.approx(against_checkpoint["perplexity"], rel=1e-6)
    overlaps = [found["routing"]["overlap"] for found in (row, against_checkpoint)]
    assert overlaps[0] == pytest.approx(overlaps[1], abs=0.01)
    assert 0.9 < overlaps[0] < 1


def _bigram_graph(folder: Path, embedding: torch.Tensor) -> None:
    """A decoder that knows one token back: no cache, no mask, no positions, no MoE operators; logits in float16."""
    values = embedding.to(torch.float16).numpy()
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
        helper.make_node("Transpose", ["embedding"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bigram",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", len(values)])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(values), "embedding")],
    )
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")


def test_a_graph_that_does_not_tell_its_routing_is_measured_by_its_logits(
    original: Path, validate: Callable[..., Result], tmp_path: Path
) -> None:
    embedding = load_file(original / "model.safetensors")["model.embed_tokens.weight"]
    _bigram_graph(tmp_path / "bigram", embedding)
    result = validate(tmp_path / "bigram", original, "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["perplexity"] > 100
    assert row["routing"] is None
    assert any("routing is not compared" in note for note in row["notes"])
    assert row["band"] == "16-bit"


def test_what_is_no_model_is_refused_by_name(
    original: Path, gguf_file: Path, validate: Callable[..., Result], text: Path, tmp_path: Path
) -> None:
    for path, message in ((text, "is no model that"), (tmp_path / "nothing", "is no file or folder that")):
        result = validate(path, original)
        assert (result.exit_code, message in result.stderr) == (2, True)
    alone = CliRunner().invoke(main, ["validate", str(gguf_file), "--text", str(text)])
    assert (alone.exit_code, "--against is missing" in alone.stderr) == (2, True)
    shutil.copy(gguf_file, tmp_path / "a.gguf")
    shutil.copy(gguf_file, tmp_path / "b.gguf")
    result = validate(tmp_path, original)
    assert (result.exit_code, "holds 2 GGUF files" in result.stderr) == (2, True)
    (tmp_path / "c.gguf").write_bytes(gguf_file.read_bytes()[:5000])
    result = validate(tmp_path / "c.gguf", original)
    assert (result.exit_code, "c.gguf" in result.stderr) == (2, True)
    for wrong in ("beauty=1", "kld=0.1,beauty=1", "kld=low", "kld=0.1,kld=0.2"):
        result = validate(gguf_file, original, "--require", wrong)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --require: ")
    assert "known are kld (" in validate(gguf_file, original, "--require", "beauty=1").stderr


def test_a_build_without_a_gpu_says_what_to_install(
    original: Path, gguf_file: Path, validate: Callable[..., Result]
) -> None:
    with pytest.raises(MissingGpuError, match=r'--gpu-layers 8: .* CPU only.* CMAKE_ARGS="-DGGML_CUDA=on" pip install'):
        check_gpu_layers(8, supported=False)
    check_gpu_layers(8, supported=True)
    check_gpu_layers(0, supported=False)
    with pytest.raises(
        MissingGpuError, match=r'has no CUDAExecutionProvider, only CPUEx.*pip install "moe-export\[gpu\]"'
    ):
        check_provider("cuda", ["CPUExecutionProvider"])
    check_provider("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    check_provider("cpu", ["CPUExecutionProvider"])
    with_gpu = validate(gguf_file, original, "--gpu-layers", "99")
    assert with_gpu.exit_code == (0 if api.llama_supports_gpu_offload() else 1), with_gpu.stderr
    folder = original.parent / "onnx"
    student = Student.teacher(open_source(original))
    write_onnx(student, "F32", folder, threads=1)
    write_client_files(student, folder)
    with_cuda = validate(folder, original, "--providers", "cuda")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert with_cuda.exit_code == (0 if has_cuda else 1), with_cuda.stderr
    unknown = validate(gguf_file, original, "--providers", "npu")
    assert (unknown.exit_code, "choose one of cpu, cuda" in unknown.stderr) == (2, True)


def test_graphs_that_cannot_be_fed_are_refused(original: Path, validate: Callable[..., Result], tmp_path: Path) -> None:
    embedding = load_file(original / "model.safetensors")["model.embed_tokens.weight"]
    _bigram_graph(tmp_path / "merged", embedding)
    path = tmp_path / "merged" / "model.onnx"
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    onnx.save(model, path)
    result = validate(tmp_path / "merged", original)
    assert (result.exit_code, "input use_cache_branch is unknown" in result.stderr) == (2, True)
    with pytest.raises(InputError, match=r"model\.onnx is missing: give the folder that holds model\.onnx"):
        from validate.runtimes.onnx import OnnxRuntimeBackend

        OnnxRuntimeBackend(tmp_path, threads=1)

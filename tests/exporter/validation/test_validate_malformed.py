"""``moe-export validate`` on files that kill a runtime, never end, or are not of the kind that they claim."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader, GGUFValueType
from onnx import TensorProto, helper, numpy_helper

from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.cli import main
from exporter.validation.guarded import Limits
from exporter.validation.guarded_validation import measured
from exporter.validation.references import StoredReference, against_checkpoint
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from tests.gguf_copies import Typed, copy_gguf, split_gguf
from validate.files.model_file import ModelFile, RuntimeChoice

_U32, _F32, _TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
_NAN = float("nan")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, heldout_folder: Path) -> Path:
    """One chunk."""
    path = tmp_path_factory.mktemp("text") / "religion.txt"
    path.write_text((heldout_folder / "religion.txt").read_text(encoding="utf-8")[:2600], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("original"), n_layers=1)


@pytest.fixture(scope="module")
def gguf_file(original: Path) -> Path:
    path = original.parent / "theirs.gguf"
    write_gguf(Student.teacher(open_source(original)), "Q8_0", path, name="x", threads=1)
    return path


@pytest.fixture(scope="module")
def onnx_folder(original: Path) -> Path:
    folder, student = original.parent / "theirs", Student.teacher(open_source(original))
    write_onnx(student, "Q4_0", folder, threads=1)
    write_client_files(student, folder)
    return folder


@pytest.fixture(scope="module")
def logits(original: Path, text: Path, gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's logits: for files that are not to come as far as being compared."""
    path = tmp_path_factory.mktemp("logits") / "reference"
    result = _validate(gguf_file, "--against", str(original), "--text", str(text), "--save-reference-logits", str(path))
    assert result.exit_code == 0, result.stderr
    return path


def _validate(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["validate", str(path), "--threads", "1", *arguments])


def _only_line(path: Path, logits: Path) -> tuple[int, str]:
    """The exit code, and the one line on stderr."""
    result = _validate(path, "--reference-logits", str(logits), "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    if result.exit_code == 4:
        report = json.loads(result.stdout)
        assert not report["passed"]
        assert line == f"failed: {report['failures'][0]}"
    return result.exit_code, line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qwen3moe.expert_used_count", (0, _U32), "n_expert_used_max > 0"),
        ("qwen3moe.expert_group_count", (3, _U32), "n_expert_groups == 0"),
        ("qwen3moe.attention.layer_norm_rms_epsilon", (-1.0, _F32), "eps >= 0.0f"),
        ("qwen3moe.attention.layer_norm_rms_epsilon", (_NAN, _F32), "eps >= 0.0f"),
        ("qwen3moe.block_count", (0, _U32), "n_layer"),
        ("qwen3moe.rope.dimension_count", (31, _U32), "n_rot"),
    ],
)
def test_an_assertion_of_llama_cpp_is_a_failed_check(
    key: str, value: Typed, message: str, gguf_file: Path, logits: Path, tmp_path: Path
) -> None:
    copy_gguf(gguf_file, tmp_path / "x.gguf", {key: value})
    code, line = _only_line(tmp_path / "x.gguf", logits)
    assert code == 4
    assert line.startswith("failed: GGUF: llama.cpp died with SIGABRT while ")
    assert f"GGML_ASSERT({message}" in line or message in line


def test_duplicate_tokens_are_a_failed_check(gguf_file: Path, logits: Path, tmp_path: Path) -> None:
    tokens = GGUFReader(gguf_file).fields["tokenizer.ggml.tokens"].contents()
    twice = ([tokens[0], tokens[0], *tokens[2:]], GGUFValueType.ARRAY, _TEXT)
    copy_gguf(gguf_file, tmp_path / "x.gguf", {"tokenizer.ggml.tokens": twice})
    assert _only_line(tmp_path / "x.gguf", logits)[0] == 4


@pytest.mark.parametrize("value", [(0, _U32), (33, _U32), (-32, GGUFValueType.INT32), (32.0, _F32), ("32", _TEXT)])
def test_an_alignment_that_is_no_power_of_two_is_named(value: Typed, gguf_file: Path, tmp_path: Path) -> None:
    copy_gguf(gguf_file, tmp_path / "x.gguf", {"general.alignment": value})
    result = _validate(tmp_path / "x.gguf", "--against", str(tmp_path / "x.gguf"))
    assert result.exit_code == 2
    assert f"its general.alignment is {value[0]!r}, which is no power of two" in result.stderr


def test_a_file_that_stands_for_the_original_may_die_too(gguf_file: Path, text: Path, tmp_path: Path) -> None:
    copy_gguf(gguf_file, tmp_path / "x.gguf", {"qwen3moe.expert_used_count": (0, _U32)})
    result = _validate(gguf_file, "--against", str(tmp_path / "x.gguf"), "--text", str(text), "--json")
    assert result.exit_code == 4
    assert f"failed: --against: {tmp_path / 'x.gguf'}: llama.cpp died with SIGABRT" in result.stderr
    assert json.loads(result.stdout)["rows"] == []
    shown = _validate(gguf_file, "--against", str(tmp_path / "x.gguf"), "--text", str(text))
    assert "Failed 1 of 1 checks" in shown.stdout


Edit = Callable[[onnx.ModelProto], None]


def _edited(source: Path, folder: Path, edit: Edit) -> Path:
    shutil.copytree(source, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, folder / "model.onnx")
    return folder


def _behind_logits(model: onnx.ModelProto, *nodes: onnx.NodeProto, **values: Any) -> None:
    """Puts nodes between ``early`` and the logits."""
    for node in model.graph.node:
        node.output[:] = ["early" if name == "logits" else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in values.items())
    model.graph.node.extend(nodes)


def _endless(model: onnx.ModelProto) -> None:
    """A loop of 2^62 turns."""
    typed = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    typed += [helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    states = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("state", "next")]
    steps = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["state"], ["next"])]
    goes_on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    body = helper.make_graph(steps, "body", [*typed, states[0]], [goes_on, states[1]])
    loop = helper.make_node("Loop", ["turns", "true", "early"], ["logits"], body=body)
    _behind_logits(model, loop, turns=1 << 62, true=True)


def _huge(model: onnx.ModelProto) -> None:
    """Asks for 4 TB."""
    nodes = (
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["largest"], keepdims=1),
        helper.make_node("Add", ["early", "largest"], ["logits"]),
    )
    _behind_logits(model, *nodes, size=np.array([1, 1 << 20, 1 << 20]))


def _with_more_heads(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            (heads,) = (attribute for attribute in node.attribute if attribute.name == "num_heads")
            heads.i += 1


def _without(name: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        kept = [output for output in model.graph.output if output.name != name]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    return edit


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (_huge, 4, "Failed to allocate memory"),
        (_with_more_heads, 4, "num_heads must be a multiple of kv_num_heads"),
        (_without("present.0.key"), 2, "present.0.key is missing"),
        (_without("logits"), 2, "logits is missing"),
    ],
    ids=["huge", "heads", "no present", "no logits"],
)
def test_a_graph_that_cannot_be_run_is_no_traceback(
    edit: Edit, code: int, message: str, onnx_folder: Path, logits: Path, tmp_path: Path
) -> None:
    found, line = _only_line(_edited(onnx_folder, tmp_path / "edited", edit), logits)
    assert (found, message in line) == (code, True), line


@pytest.mark.parametrize("fault", ["gone", "half", "folder"])
def test_a_data_file_that_is_not_whole_is_named(fault: str, onnx_folder: Path, logits: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_folder, tmp_path / "edited")
    data = tmp_path / "edited" / "model.onnx.data"
    content = data.read_bytes()
    data.unlink()
    if fault == "half":
        data.write_bytes(content[: len(content) // 2])
    elif fault == "folder":
        data.mkdir()
    code, line = _only_line(tmp_path / "edited", logits)
    assert code == 2
    assert line.startswith(f"error: {data.with_name('model.onnx')}")


@pytest.fixture(scope="module")
def reference(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredReference:
    folder = tmp_path_factory.mktemp("reference")
    return against_checkpoint(open_source(original), text, 1, folder / "logits", folder)


def test_a_graph_that_never_ends_is_ended(onnx_folder: Path, reference: StoredReference, tmp_path: Path) -> None:
    graph = _edited(onnx_folder, tmp_path / "edited", _endless) / "model.onnx"
    row, checks = measured(ModelFile("onnx", graph), reference, None, RuntimeChoice(1), {}, Limits(seconds=5))
    assert row["error"] == "ONNX Runtime was ended, because running it did not come on for 5 s"
    assert [check.name for check in checks if not check.passed] == ["onnx.runs"]


def test_parts_of_one_model_are_validated_as_one(gguf_file: Path, original: Path, text: Path, tmp_path: Path) -> None:
    parts = split_gguf(gguf_file, tmp_path / "big", 3)
    whole, split = GgufFile(gguf_file), GgufFile(parts[0])
    assert set(split.tensors) == set(whole.tensors)
    assert len({split.path_of(entry) for entry in split.tensors.values()}) == 3
    for name, entry in whole.tensors.items():
        rows = np.prod(entry.shape[:-1], dtype=int)
        np.testing.assert_array_equal(
            split.read_rows(split.tensors[name], 0, rows), whole.read_rows(entry, 0, rows), strict=True
        )
    result = _validate(tmp_path, "--against", str(original), "--text", str(text), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert not any("weights were not compared" in note for note in report["rows"][0]["notes"])
    assert "gguf.damaged_weights" in {check["name"] for check in report["checks"]}


def test_a_part_that_is_missing_or_is_not_the_first_is_named(gguf_file: Path, tmp_path: Path) -> None:
    parts = split_gguf(gguf_file, tmp_path / "big", 3)
    result = _validate(parts[1], "--against", str(parts[1]))
    assert result.exit_code == 2
    assert f"{parts[1]} is a part of a model that was split into 3, and not the first" in result.stderr
    parts[1].unlink()
    for path in (tmp_path, parts[0]):
        result = _validate(path, "--against", str(path))
        assert result.exit_code == 2
        assert str(parts[1]) in result.stderr

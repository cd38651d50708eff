"""Every type of llama.cpp's cache that ``--kv-type`` offers, from end to end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from compressors.model.files.gguf.kv_types import KV_TYPES, bytes_per_value, is_quantized, values_per_block
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.planning.recipe import BudgetChoice
from exporter.writing.gguf.writer import write_gguf
from validate.report.run import llama_cpp_python_command
from validate.runtimes.llama_cpp import QUANTIZED_KV_TYPES, LlamaCppBackend

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
Command = Callable[..., Sequence[str]]


@pytest.mark.parametrize("kv_type", ["f32", "q4_0"])
def test_an_export_for_this_cache_ends_well(
    kv_type: str,
    tiny_recipe: Path,
    toy_command: Command,
    run_command: Run,
    schema_errors: Callable[[object], list[str]],
    tmp_path: Path,
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    recipe["budget"]["kv_type"] = kv_type
    recipe |= {"onnx": None, "recover": recipe["recover"] | {"rungs": []}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    out = tmp_path / "out"
    result = run_command(toy_command(out, "--recipe", str(tmp_path / "recipe.yaml"), "--shard-size", "1MB"))
    assert result.returncode in (0, 4), result.stderr  # with so little text a check may fail
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert schema_errors(report) == []
    (row,) = (row for row in report["validation"] if row["artifact"] == "gguf")
    assert row["error"] is None
    assert row["routing"]["vs_torch_student"]["overlap"] > 0.8
    (artifact,) = report["artifacts"]
    assert artifact["path"].endswith(f"-00001-of-{len(artifact['files']):05}.gguf"), "it came in parts"
    assert set(artifact["files"]) == {path.name for path in out.glob("*.gguf")}
    assert artifact["bytes"] == sum(path.stat().st_size for path in out.glob("*.gguf"))
    assert f"llama-cli -m {artifact['path']}" in (out / "README.md").read_text(encoding="utf-8")
    measured, predicted = report["budget"]["measured"]["gguf"], report["budget"]["predicted"]["gguf"]
    assert measured["buffers"]["kv_cache"] == pytest.approx(predicted["kv_cache"], rel=0.05)  # llama.cpp rounds
    assert 0 < measured["total"] <= predicted["total"]
    if kv_type not in QUANTIZED_KV_TYPES:
        assert row["quantized_cache"] is None
        return
    cache = row["quantized_cache"]
    assert cache["kv_type"] == kv_type
    assert cache["perplexity"] == pytest.approx(row["perplexity"], rel=0.2)
    assert f"was compared with an f16 cache; with its {kv_type} cache" in " ".join(result.stdout.split())
    assert "flash_attn=True" in llama_cpp_python_command(report, Path("x.gguf"))


def test_routing_is_read_beside_a_quantized_cache(
    toy_model: Path, heldout_tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    write_gguf(Student.teacher(open_source(toy_model)), "Q8_0", tmp_path / "x.gguf", name="x", threads=1)
    tokens_BT = heldout_tokens[:128].reshape(1, 128)
    (exact,) = LlamaCppBackend(tmp_path / "x.gguf", n_ctx=128, threads=1).run(tokens_BT)
    for kv_type in QUANTIZED_KV_TYPES:
        (output,) = LlamaCppBackend(tmp_path / "x.gguf", n_ctx=128, kv_type=kv_type, threads=1).run(tokens_BT)
        assert output.routing is not None and exact.routing is not None
        assert (output.routing.experts_LTK[0, 0] == exact.routing.experts_LTK[0, 0]).all()
        same = np.sort(output.routing.experts_LTK) == np.sort(exact.routing.experts_LTK)
        assert 0.7 < same.mean() < 1


def test_facts_about_the_types_follow_from_ggml_s_blocks() -> None:
    assert {name: (float(bytes_per_value(name)), values_per_block(name)) for name in KV_TYPES} == {
        "f32": (4.0, 1),
        "f16": (2.0, 1),
        "q8_0": (34 / 32, 32),
        "q4_0": (18 / 32, 32),
    }
    assert [name for name in KV_TYPES if is_quantized(name)] == ["q8_0", "q4_0"]
    assert tuple(KV_TYPES) == get_args(BudgetChoice.model_fields["kv_type"].annotation)

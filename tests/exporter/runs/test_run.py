"""The whole pipeline on a toy: what it builds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGUFValueType
from transformers import AutoModelForCausalLM

from compressors.model.errors import InputError
from exporter.validation.task_runs import task_failures, task_results, tasks_table
from exporter.writing.files import sha256_of
from tests.gguf_copies import copy_gguf
from validate.metrics.logits_file import LogitsFileWriter
from validate.runtimes.cost import RuntimeCost

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
Command = Callable[..., Sequence[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_command: Command, run_command: Run) -> tuple[Path, str]:
    """An uninterrupted run's output folder, and what it printed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    result = run_command(toy_command(out, "--save-student", "--floors", "--verbose"))
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def _report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def test_everything_promised_is_there(finished: tuple[Path, str]) -> None:
    out, printed = finished
    report = _report(out)
    (gguf,) = out.glob("*.gguf")
    for name in ("onnx/model.onnx", "onnx/genai_config.json", "recipe.yaml", "report.html", "README.md"):
        assert (out / name).stat().st_size > 0
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert {gguf.name, "onnx/model.onnx", "onnx/model.onnx.data", "recipe.yaml"} <= set(sums)
    assert all(sha256_of(out / name) == digest for name, digest in sums.items())
    assert (out / "LICENSE").read_text(encoding="utf-8") == "anything goes"
    assert "Its text is in `LICENSE`." in (out / "README.md").read_text(encoding="utf-8")
    kinds = report["artifacts"][0]["tensor_types"]
    assert kinds["gate of the experts"] == {"Q4_0": 2}
    assert "| gate of the experts | Q4_0 |" in (out / "README.md").read_text(encoding="utf-8")
    assert "llama" in printed
    assert "onnxruntime" in printed
    assert not out.with_name("out.work").exists()
    assert {row["artifact"] for row in report["validation"]} == {"teacher", "student", "gguf", "onnx"}


def test_the_report_is_what_its_schema_says(
    finished: tuple[Path, str], schema_errors: Callable[[Any], list[str]]
) -> None:
    report = _report(finished[0])
    assert schema_errors(report) == []
    report["validation"][2]["tokens"] = "many"
    report["verdict"]["passes"] = True
    assert len(schema_errors(report)) == 2


def test_the_report_says_what_each_stage_read_of_the_original(finished: tuple[Path, str], toy_model: Path) -> None:
    read = _report(finished[0])["source_bytes_read"]
    weights = (toy_model / "model.safetensors").stat().st_size
    head = 4096 * 256 * 2  # the embedding: it is checked, looked up, and read for the predictions of each split
    assert weights - head < read["calibrate"] < weights + 5 * head
    assert read["compress"] < weights / 100, "routers alone"
    for stage in ("gguf", "onnx", "student"):
        assert head < read[stage] < weights / 2, "once, without the experts that are gone"
    assert 0 < read["validate_gguf"] <= 2 * head, "to compare with the original's predictions"


def test_the_budget_holds_for_each_artifact(finished: tuple[Path, str]) -> None:
    report = _report(finished[0])
    assert 4 <= report["student"]["n_experts"] < 32
    for artifact in report["artifacts"]:
        predicted = report["budget"]["predicted"][artifact["format"]]["file"]
        assert artifact["bytes"] == predicted <= 3_000_000


def test_figures_agree_between_torch_and_the_runtimes(finished: tuple[Path, str]) -> None:
    report = _report(finished[0])
    rows = {row["artifact"]: row for row in report["validation"]}
    assert rows["teacher"]["perplexity"] < rows["student"]["perplexity"]
    for name in ("gguf", "onnx"):
        assert rows[name]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=0.05)
        assert rows[name]["routing"]["vs_torch_student"]["overlap"] > 0.85
        assert rows[name]["routing"]["router_alone"]["overlap"] > 0.999
        assert rows[name]["routing"]["vs_torch_student"]["ties"]["differing_tied"] < 1
        assert rows[name]["peak_rss_bytes"] > rows[name]["base_rss_bytes"] > 10_000_000
        assert rows[name]["perplexity_vs_teacher"]["base"] == pytest.approx(rows["teacher"]["perplexity"], rel=1e-4)
        for figures, figure, interval in (
            (rows[name], "perplexity", "perplexity_interval"),
            (rows[name], "top1_agreement", "top1_agreement_interval"),
            (rows[name]["kld"], "mean", "mean_interval"),
            (rows[name]["routing"]["vs_torch_student"], "overlap", "overlap_interval"),
        ):
            assert figures[interval][0] < figures[figure] < figures[interval][1]
    assert list(report["load"]) == ["teacher", "student", "gguf", "onnx"]
    sizes = {"teacher": 32, **dict.fromkeys(["student", "gguf", "onnx"], report["student"]["n_experts"])}
    for name, load in report["load"].items():
        assert [len(layer) for layer in load["tokens"]] == [sizes[name]] * 2
        np.testing.assert_allclose(np.sum(load["tokens"], axis=1), report["student"]["top_k"], rtol=1e-3)
        np.testing.assert_allclose(np.sum(load["gate_weight"], axis=1), 1, rtol=1e-3)
    # llama.cpp's Q4_0 has other types than ONNX's: what differs would not be the runtimes
    assert rows["onnx"]["kld_vs_other_runtime"] is None
    assert report["verdict"]["passed"]


def test_floors_stand_beside_the_figures(finished: tuple[Path, str]) -> None:
    """Each file is compared with torch computing with its own numbers."""
    out, printed = finished
    rows = {row["artifact"]: row for row in _report(out)["validation"]}
    same = {name: rows[name]["floor"]["same_weights"] for name in ("gguf", "onnx")}
    assert same["gguf"]["perplexity_torch"] != same["onnx"]["perplexity_torch"]
    for name, floor in same.items():
        assert floor["perplexity"] == rows[name]["perplexity"]
        assert floor["chunks"] == rows[name]["chunks"]
        assert floor["perplexity_ratio"] == pytest.approx(1, abs=0.003)
        assert floor["kld"]["mean"] < 0.05 * rows[name]["kld"]["mean"]
        # the numbers are the same, so it routes more alike than the student before they were rounded
        assert floor["routing"]["overlap"] > rows[name]["routing"]["vs_torch_student"]["overlap"]
    for name, weight_type in (("gguf", "BF16"), ("onnx", "F32")):
        floor = rows[name]["floor"]["teacher"]
        assert (floor["type"], floor["n_layers"], floor["of_layers"], floor["error"]) == (weight_type, 2, 2, None)
        assert floor["perplexity_torch"] == pytest.approx(floor["perplexity"], rel=0.002)
        assert floor["routing"]["overlap"] > 0.99
    assert rows["teacher"]["floor"] is rows["student"]["floor"] is None
    assert "floor" in printed


def test_domains_make_up_the_whole(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "Worst domain: " in printed
    for row in _report(out)["validation"][1:]:
        domains = row["domains"]
        assert [figures["domain"] for figures in domains] == ["encyclopedic", "religion"]
        tokens = [figures["tokens"] for figures in domains]
        assert sum(tokens) == row["tokens"]
        mean = np.average([figures["kld"]["mean"] for figures in domains], weights=tokens)
        assert row["kld"]["mean"] == pytest.approx(mean)
        logs = np.average(np.log([figures["perplexity"] for figures in domains]), weights=tokens)
        assert row["perplexity"] == pytest.approx(np.exp(logs))


def test_the_recovery_gate_is_reported(finished: tuple[Path, str]) -> None:
    rungs = _report(finished[0])["recovery"]
    assert [rung["rung"] for rung in rungs] == ["router", "router + all experts"]
    for rung in rungs:
        assert rung["accepted"] == (rung["selection_kld_after"] < rung["selection_kld_before"])
        assert rung["tokens"] == rung["steps"] * 8 * 512 or rung["tokens"] % 512 == 0
    first, second = rungs
    left = "after" if first["accepted"] else "before"
    for figure in ("kld", "perplexity"):
        # it goes on from there
        assert second[f"selection_{figure}_before"] == first[f"selection_{figure}_{left}"]


def test_the_saved_student_loads_in_stock_transformers(finished: tuple[Path, str]) -> None:
    out, _ = finished
    student = AutoModelForCausalLM.from_pretrained(out / "student")
    assert student.config.num_experts == _report(out)["student"]["n_experts"]


def test_the_same_command_again_does_nothing_and_another_is_refused(
    finished: tuple[Path, str], toy_command: Command, run_command: Run
) -> None:
    out, printed = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run_command(toy_command(out, "--save-student", "--floors", "--verbose"))
    assert (again.returncode, again.stdout) == (0, printed)
    short = run_command(toy_command(out, "--save-student", "--floors")).stdout
    assert len(short.splitlines()) < 30 < len(printed.splitlines())
    rows = _report(out)["validation"]
    assert len({row["generation"]["example"]["prompt"] for row in rows if row["generation"]}) == 1
    how = "tokens drawn with the same random numbers for each, at temperature 0.5"
    assert f"One text, continued ({how}):" in " ".join(short.split())
    assert str(out / "report.html") in short and str(out / "README.md") in short
    other = run_command(toy_command(out, budget="6MB"))
    assert other.returncode == 2
    assert "belongs to another run" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_recipe_is_followed_and_a_failed_check_gives_exit_code_4(
    finished: tuple[Path, str], toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((finished[0] / "recipe.yaml").read_text())
    recipe["recover"]["rungs"] = []
    recipe["onnx"] = None
    recipe["save_student"] = False
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    mine = ("--recipe", str(tmp_path / "mine.yaml"), "--require", "kld=0.0001")
    result = run_command(toy_command(tmp_path / "out", *mine))
    assert result.returncode == 4, result.stderr
    report = _report(tmp_path / "out")
    assert report["recovery"] == []
    assert [artifact["format"] for artifact in report["artifacts"]] == ["gguf"]
    assert report["student"]["kept"] == _report(finished[0])["student"]["kept"]
    assert [check["name"] for check in report["verdict"]["checks"] if not check["passed"]] == ["gguf.kld"]
    assert "failed: GGUF: mean divergence from the original: " in result.stderr
    assert next((tmp_path / "out").glob("*.gguf")).stat().st_size > 0


def test_validate_measures_published_files_again_and_notices_damage(
    finished: tuple[Path, str], toy_model: Path, small_texts: tuple[Path, Path], run_command: Run, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    command = [sys.executable, "-m", "exporter", "validate", str(out), "--text", str(small_texts[1]), "--threads", "1"]
    good = run_command([*command, "--json"])
    assert good.returncode == 0, good.stderr
    assert {row["artifact"] for row in json.loads(good.stdout)["rows"]} == {"gguf", "onnx"}
    (gguf,) = out.glob("*.gguf")
    data = bytearray(gguf.read_bytes())
    middle = len(data) // 2  # in the first layer, whose damage moves the routing of the second
    data[middle - 100_000 : middle] = bytes(100_000)
    gguf.write_bytes(data)
    bad = run_command([*command, "--json"])
    assert bad.returncode == 4
    failed = {check["name"] for check in json.loads(bad.stdout)["checks"] if not check["passed"]}
    assert {"files changed", "gguf.perplexity_as_reported", "gguf.routing_as_reported"} <= failed
    assert "failed: GGUF: change of perplexity since the report: " in bad.stderr


def test_a_logits_file_stands_for_the_original(
    finished: tuple[Path, str], short_text: Path, run_command: Run, tmp_path: Path
) -> None:
    """The file of llama-perplexity: written from the original, then read in its place."""
    command = [sys.executable, "-m", "exporter", "validate", str(finished[0]), "--threads", "1", "--json"]
    path = tmp_path / "base.kld"
    saved = run_command([*command, "--text", str(short_text), "--save-reference-logits", str(path)])
    assert saved.returncode == 0, saved.stderr
    read = run_command([*command, "--reference-logits", str(path)])
    assert read.returncode == 0, read.stderr
    with_original, with_file = json.loads(saved.stdout), json.loads(read.stdout)
    assert with_file["perplexity_teacher"] == with_original["perplexity_teacher"]
    for expected, found in zip(with_original["rows"], with_file["rows"], strict=True):
        assert expected["kld"]["mean"] > 0.001
        unknown = dict.fromkeys(("routing", "routing_overlap_vs_teacher", "routing_overlap_interval"))
        other = {field.name: found[field.name] for field in fields(RuntimeCost)}  # is measured anew
        other["notes"] = []  # on the original's tokenizer, which is not known
        assert found == expected | unknown | other
    both = run_command([*command, "--reference-logits", str(path), "--text", str(short_text)])
    assert both.returncode == 2
    assert "--reference-logits holds original and text" in both.stderr
    LogitsFileWriter(path, np.zeros((2, 64), np.int64), 100)
    other = run_command([*command, "--reference-logits", str(path)])
    assert other.returncode == 2
    assert "the reference has a vocabulary of 100 and the model one of 4,096" in other.stderr


@pytest.fixture(scope="module")
def with_a_deadly_file(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder, whose GGUF file makes llama.cpp abort."""
    out = tmp_path_factory.mktemp("deadly") / "out"
    shutil.copytree(finished[0], out)
    (gguf,) = out.glob("*.gguf")
    (whole,) = finished[0].glob("*.gguf")
    copy_gguf(whole, gguf, {"qwen3moe.expert_used_count": (0, GGUFValueType.UINT32)})
    return out


def test_a_file_that_kills_its_runtime_does_not_keep_the_other_from_being_measured(
    with_a_deadly_file: Path,
    finished: tuple[Path, str],
    toy_model: Path,
    short_text: Path,
    run_command: Run,
) -> None:
    command = [sys.executable, "-m", "exporter", "validate", str(with_a_deadly_file), "--against", str(toy_model)]
    result = run_command([*command, "--text", str(short_text), "--threads", "1", "--json"])
    assert result.returncode == 4
    report = json.loads(result.stdout)
    assert [row["artifact"] for row in report["rows"]] == ["gguf", "onnx"]
    assert report["rows"][1]["error"] is None
    assert report["rows"][1]["perplexity"] > 1
    assert report["failures"][0].startswith("GGUF: llama.cpp died with SIGABRT while loading it: llama-model.cpp:")
    assert f"failed: {report['failures'][0]}" in result.stderr.splitlines()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning")
def test_tasks_of_a_file_that_kills_its_runtime_are_a_failed_check(with_a_deadly_file: Path, tmp_path: Path) -> None:
    fixture = Path(__file__).parents[2] / "fixtures" / "tasks"
    text = (fixture / "last_word.yaml").read_text(encoding="utf-8").replace("DATA", str(fixture))
    (tmp_path / "last_word.yaml").write_text(text, encoding="utf-8")
    results = task_results(with_a_deadly_file, tmp_path, threads=1)
    assert [result["error"] is None for result in results] == [True, False, True]
    assert len(tasks_table(results).columns) == 3
    (failure,) = task_failures(results)
    assert failure.startswith("GGUF, tasks: llama.cpp died with SIGABRT while loading it: ")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning")
def test_tasks_are_run_on_the_files_and_on_the_original(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Uses the adapter that tests/validate/tasks/test_tasks.py compares with the harness's own model."""
    fixture = Path(__file__).parents[2] / "fixtures" / "tasks"
    text = (fixture / "last_word.yaml").read_text(encoding="utf-8").replace("DATA", str(fixture))
    (tmp_path / "last_word.yaml").write_text(text, encoding="utf-8")
    results = task_results(finished[0], tmp_path, threads=1)
    assert [(result["artifact"], result["runtime"]) for result in results] == [
        ("teacher", "torch"),
        ("gguf", "llama.cpp"),
        ("onnx", "onnxruntime"),
    ]
    for result in results:
        accuracy = result["tasks"]["last_word"]["acc"]
        assert round(20 * accuracy) == pytest.approx(20 * accuracy)
    table = tasks_table(results)
    assert table.row_count == 1
    assert list(table.columns[0].cells) == ["last_word: acc"]
    with pytest.raises(InputError, match=r"has no readable report\.json"):
        task_results(tmp_path, tmp_path / "last_word.yaml")

"""The page, the card and the terminal lines: all from one plain report, complete and honest when parts are missing."""

from __future__ import annotations

import copy
import io
import math
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from validate.report import charts, facts, numbers
from validate.report.html import render_html
from validate.report.model_card import render_model_card
from validate.report.run import ollama_commands, run_instructions
from validate.report.statistics import STATISTICS
from validate.report.terminal import summary

_SECTIONS = (
    "Size and budget",
    "Fidelity",
    "Routing agreement",
    "Recovery",
    "Surviving experts",
    "Load of the experts",
    "What it is worth in use",
    "Speed and memory",
    "Checks",
    "Reproduce",
    "Time and memory of the run",
)
_VOID = {"meta", "br", "hr", "img", "link", "input"}
_CRASH = "killed by SIGILL (illegal instruction) in libggml-cpu while evaluating <blk.0>"


def sample_report() -> dict[str, Any]:
    """A run like those measured on the bundled model: 24 of 32 experts, both formats, two rungs of recovery."""
    onnx_files = {
        "onnx/model.onnx": {"bytes": 48_213, "sha256": "5e" * 32},
        "onnx/model.onnx.data": {"bytes": 9_887_744, "sha256": "6f" * 32},
    }
    return {
        "schema": 1,
        "tool": {"name": "moe-export", "version": "0.1.0"},
        "source": {
            "model": "example-org/Fine-21M-MoE",
            "identity": "ab" * 32,
            "family": "qwen3_moe",
            "parameters": 21_239_808,
            "bytes": 42_496_512,
            "dtype": "bfloat16",
            "n_layers": 6,
            "n_experts": 32,
            "expert_width": 128,
            "top_k": 4,
            "n_kv_heads": 4,
            "head_dim": 32,
            "license": "apache-2.0",
        },
        "deviations": [{"artifact": "gguf", "what": "llama.cpp adds 1e-6 where the model adds 1e-20"}],
        "against_original": {
            "trained_parameters": 46_080,
            "trained_share": 46_080 / 16_521_216,
            "files": {
                "gguf": {"size_ratio": 0.2333, "decode_speed_ratio": None, "last_words_kept": 0.31 / 0.42},
                "onnx": {"size_ratio": 0.24, "decode_speed_ratio": 0.8, "last_words_kept": None},
            },
        },
        "command": "moe-export example-org/Fine-21M-MoE --budget 16MB --context 2048 --out fine-16MB",
        "recipe": {"method": "reap", "experts": 24, "types": {"experts": "Q4_0", "embedding": "Q8_0"}, "seed": 0},
        "text": {
            "calibration": {"sha256": "c1" * 32, "documents": 1480, "blocks": 96},
            "selection": {"sha256": "5e" * 32, "documents": 164, "blocks": 16},
            "heldout": {"sha256": "4e" * 32, "documents": 410, "blocks": 15},
        },
        "student": {
            "n_layers": 6,
            "n_moe_layers": 6,
            "n_experts": 24,
            "fewest_experts": 24,
            "expert_width": 128,
            "top_k": 4,
            "parameters": 16_521_216,
            "kept": _kept(6, 32, 24),
            "merged": False,
            "expert_map": {
                "teacher_experts": 32,
                "layers": [
                    {"source": layer, "groups": [[expert] for expert in kept], "width": None}
                    for layer, kept in enumerate(_kept(6, 32, 24))
                ],
            },
        },
        "load": {"teacher": _load(32), "student": _load(24), "gguf": _load(24), "onnx": _load(24)},
        "budget": {
            "bytes": 16_000_000,
            "kind": "total",
            "context": 2048,
            "kv_type": "f16",
            "predicted": {
                "gguf": _lines(9_914_112, 1_572_864, 2_097_152, 1_310_720),
                "onnx": _lines(9_935_957, 3_145_728, 1_703_936, 1_048_576),
            },
            "measured": {
                "gguf": {"file": 9_914_112, "total": 14_680_064},
                "onnx": {"file": 9_935_957, "total": 15_466_496},
            },
        },
        "artifacts": [
            {
                "format": "gguf",
                "path": "Fine-24x0.9M-Q4_0.gguf",
                "files": {"Fine-24x0.9M-Q4_0.gguf": {"bytes": 9_914_112, "sha256": "d7" * 32}},
                "bytes": 9_914_112,
                "bits_per_weight": 4.8,
                "type": "Q4_0",
            },
            {
                "format": "onnx",
                "path": "onnx",
                "files": onnx_files,
                "bytes": 9_935_957,
                "bits_per_weight": 4.81,
                "type": "Q4_0",
            },
        ],
        "recovery": [
            _rung("router", "kd", 5e-4, 0.5412, 0.3829, True),
            _rung("router + most-used experts", "kd", 1e-4, 0.3829, 0.2604, True),
            _rung("all", "next-token", 2e-5, 0.2604, 0.2711, False),
        ],
        "validation": _validation(),
        "verdict": {
            "passed": False,
            "checks": [
                {"name": "gguf.budget", "value": 14_680_064, "threshold": 16_000_000, "passed": True},
                {"name": "gguf.perplexity_change", "value": 0.0004, "threshold": 0.05, "passed": True},
                {"name": "gguf.routing", "value": 0.9961, "threshold": 0.85, "passed": True},
                {"name": "gguf.kld", "value": 0.2646, "threshold": 0.2, "passed": False},
                {"name": "onnx.budget", "value": 15_466_496, "threshold": 16_000_000, "passed": True},
                {"name": "loops per prompt", "value": None, "threshold": 0.1, "passed": False},
            ],
        },
        "timings": {"inspect": 0.31, "calibrate": 74.2, "compress": 1.9, "recover": 1311.0, "write gguf": 4.4,
                    "write onnx": 4.9, "validate": 131.7},
        "peak_rss_bytes": {"inspect": 310_378_496, "calibrate": 912_261_120, "compress": 801_112_064,
                           "recover": 1_344_274_432, "write gguf": 601_882_624, "write onnx": 688_914_432,
                           "validate": 1_104_674_816},
        "source_bytes_read": {"calibrate": 42_384_736, "compress": 0, "recover": 254_308_416},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "llama-cpp-python": "0.3.36", "onnxruntime": "1.31.1",
                        "threads": 2, "processor": "x86-64, 2 cores"},
    }  # fmt: skip


def _kept(n_layers: int, n_experts: int, n_kept: int) -> list[list[int]]:
    """Different experts in every layer, in no visible pattern."""
    orders = [sorted(range(n_experts), key=lambda e: (e + 3) * (e + 7 + layer) * 37 % 101) for layer in range(n_layers)]
    return [sorted(order[:n_kept]) for order in orders]


def _load(n_experts: int) -> dict[str, Any]:
    """One expert of each layer gets nothing, another six times its share."""
    even = 4 / n_experts
    layer = [0.0, 6 * even, *[even * (n_experts - 6) / (n_experts - 2)] * (n_experts - 2)]
    return {
        "tokens": [layer] * 6, "gate_weight": [[share / 4 for share in layer]] * 6,
        "variation": [1.0351] * 6, "dead": [[0]] * 6, "mean_variation": 1.0351, "n_dead": 6, "largest": 6.0,
    }  # fmt: skip


def _lines(weights: int, kv_cache: int, compute: int, reserve: int) -> dict[str, int]:
    total = weights + kv_cache + compute + reserve
    parts = {"weights": weights, "kv_cache": kv_cache, "compute": compute, "reserve": reserve}
    return {"file": weights, **parts, "total": total}


def _rung(name: str, loss: str, rate: float, before: float, after: float, accepted: bool) -> dict[str, Any]:
    return {
        "rung": name,
        "loss": loss,
        "learning_rate": rate,
        "steps": 120,
        "tokens": 491_520,
        "selection_kld_before": before,
        "selection_kld_after": after,
        "selection_perplexity_before": 100 * before,
        "selection_perplexity_after": 100 * after,
        "accepted": accepted,
        "why": None,
        "seconds": 437.0,
    }


def _agreement(overlap: float, kept: float = 1.0, ties: dict[str, Any] | None = None) -> dict[str, Any]:
    layers = []
    for layer in range(6):
        value = overlap - (1 - overlap) * 0.25 * math.sin(1.3 * layer)
        layers.append(
            {
                "overlap": value,
                "exact": value**4,
                "top1": value**0.5,
                "weighted": value**0.7,
                "kept_gate_weight": kept,
            }
        )
    figures = {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
    return {
        **figures,
        "overlap_interval": (figures["overlap"] - 0.003, figures["overlap"] + 0.0002),
        "ties": ties,
        "per_layer": layers,
    }


_TIES = {"threshold": 0.01, "tokens": 0.0526, "differing": 0.0151, "differing_tied": 0.7612,
         "overlap_without_ties": 0.99923, "median_margin": 0.131, "median_margin_differing": 0.0041,
         "median_margin_change": 0.0047}  # fmt: skip

_LOWER = {"min": -0.00001, "p001": 0.01, "p01": 0.06, "p05": 0.13, "p10": 0.21}
_UPPER = {"p90": 2.1, "p95": 2.9, "p99": 5.2, "p999": 9.6, "max": 21.0}


def _kld(mean: float) -> dict[str, Any]:
    shares = {"mean": 1.0, "mean_error": 0.01, **_LOWER, "median": 0.62, **_UPPER}
    return {**{key: mean * share for key, share in shares.items()}, "mean_interval": (0.95 * mean, 1.06 * mean)}


def _statistics(perplexity: float) -> dict[str, Any]:
    """The rest of llama-perplexity's list, and the intervals."""
    ratio = perplexity / 38.412
    upper = {key: 0.01 * share for key, share in _UPPER.items()}
    lower = {key: -value for key, value in zip(_LOWER, reversed(upper.values()), strict=True)}
    return {
        "chunks": 15,
        "perplexity_interval": (0.92 * perplexity, 1.09 * perplexity),
        "top1_agreement_error": 0.0072,
        "top1_agreement_interval": (0.7093, 0.7341),
        "perplexity_vs_teacher": {
            "base": 38.412, "base_error": 0.913, "correlation": 0.9712, "log_ratio": math.log(ratio),
            "log_ratio_error": 0.0061, "ratio": ratio, "ratio_error": 0.0061 * ratio,
            "difference": perplexity - 38.412, "difference_error": 0.31,
        },
        "delta_p": {"mean": -0.0213, "mean_error": 0.0009, "rms": 0.0711, "rms_error": 0.0021, "p25": -0.001,
                    "median": -0.0000004, "p75": 0.0008, **lower, **upper},
    }  # fmt: skip


def _floor(kld: float, teacher_type: str, n_layers: int) -> dict[str, Any]:
    """A runtime that is off by so much, in nats."""
    figures = {
        "tokens": 3825, "chunks": 15, "perplexity": 49.2, "perplexity_torch": 49.21, "perplexity_difference": -0.01,
        "perplexity_difference_error": 0.02, "perplexity_ratio": 0.9998, "perplexity_ratio_interval": (0.9991, 1.0004),
        "kld": _kld(kld), "top1_agreement": 0.9934, "top1_agreement_interval": (0.9921, 0.9946),
        "routing": {key: value for key, value in _agreement(0.9987).items() if key != "per_layer"},
    }  # fmt: skip
    teacher = {"type": teacher_type, "n_layers": n_layers, "of_layers": 6, "error": None, **figures, "chunks": 10}
    return {"same_weights": figures, "teacher": teacher}


def _domains(kld: float) -> list[dict[str, Any]]:
    """Code is hit hardest; of prose there is one chunk."""
    return [
        {
            "domain": name, "chunks": chunks, "tokens": 255 * chunks, "perplexity": 40.0 * share,
            "perplexity_error": 1.0, "perplexity_teacher": 40.0, "perplexity_ratio": share,
            "perplexity_ratio_interval": None if chunks == 1 else (0.98 * share, 1.02 * share),
            "kld": {"mean": kld * share, "mean_interval": None if chunks == 1 else (0.9 * kld, 1.8 * kld)},
            "top1_agreement": 0.7, "top1_agreement_interval": None if chunks == 1 else (0.69, 0.71),
        }
        for name, chunks, share in (("code", 14, 1.4), ("prose", 1, 1.1))
    ]  # fmt: skip


def _generation(loop_rate: float) -> dict[str, Any]:
    figures = {"loop_rate": loop_rate, "loop_rate_interval": (0.02, 0.31), "end_of_text_rate": 0.9,
               "end_of_text_rate_interval": (0.7, 0.98), "longest_repeat_mean": 7.25,
               "longest_repeat_max": 41}  # fmt: skip
    return {"prompts": 24, "prompt_tokens": 32, "new_tokens": 64, "greedy": figures,
            "sampled": figures | {"loop_rate": 0.0},
            "example": {"prompt": " The sea\nwas", "temperature": 0.5, "text": " calm, and <calm>"}}  # fmt: skip


def _cloze(accuracy: float) -> dict[str, Any]:
    figures = {"words": 412, "accuracy": accuracy, "accuracy_interval": (accuracy - 0.05, accuracy + 0.05),
               "teacher_accuracy": 0.42, "kept": accuracy / 0.42, "kept_interval": (0.66, 0.81)}  # fmt: skip
    return figures | {"domains": {"code": figures, "prose": figures | {"accuracy": 0.17}}}


def _validation() -> list[dict[str, Any]]:
    shared = {"tokens": 3825, "perplexity_teacher": 38.412, "kld_vs_other_runtime": None, "error": None}
    unmeasured = dict.fromkeys(
        ("base_rss_bytes", "peak_rss_bytes", "load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second",
         "repetition")
    )  # fmt: skip
    nothing = {"vs_torch_student": None, "vs_other_runtime": None, "vs_teacher": None}
    return [
        {**shared, **unmeasured, "artifact": "teacher", "runtime": "torch", "runtime_version": "2.13.0",
         "perplexity": 38.412, "perplexity_error": 0.913, "perplexity_student_torch": None, "kld": None,
         "top1_agreement": None, "routing": nothing, "generation": _generation(0.0417), "cloze": _cloze(0.42)},
        {**shared, **unmeasured, "artifact": "student", "runtime": "torch", "runtime_version": "2.13.0",
         "perplexity": 49.207, "perplexity_error": 1.182, "perplexity_student_torch": 49.207, "kld": _kld(0.2641),
         **_statistics(49.207),
         "top1_agreement": 0.7214, "routing": {**nothing, "vs_teacher": _agreement(0.771, 0.842)}},
        {**shared, "artifact": "gguf", "runtime": "llama.cpp", "runtime_version": "0.3.36",
         "perplexity": 49.226, "perplexity_error": 1.183, "perplexity_student_torch": 49.207, "kld": _kld(0.2646),
         **_statistics(49.226),
         "top1_agreement": 0.7212, "kld_vs_other_runtime": 0.00031,
         "floor": _floor(0.00112, "BF16", 6), "domains": _domains(0.2646),
         "routing": {"vs_torch_student": _agreement(0.9961, ties=_TIES), "vs_other_runtime": _agreement(0.9958),
                     "vs_teacher": _agreement(0.769, 0.842), "router_alone": _agreement(0.999871)},
         "base_rss_bytes": 72_351_744, "peak_rss_bytes": 88_080_384, "load_seconds": 0.09,
         "prefill_tokens_per_second": 2914.0, "decode_tokens_per_second": 412.5,
         "repetition": {"prompts": 24, "loop_rate": 0.125, "end_of_text_rate": 0.9},
         "generation": _generation(0.125), "cloze": _cloze(0.31)},
        {**shared, "artifact": "onnx", "runtime": "onnxruntime", "runtime_version": "1.31.1",
         "perplexity": 49.209, "perplexity_error": 1.182, "perplexity_student_torch": 49.207, "kld": _kld(0.2652),
         **_statistics(49.209),
         "top1_agreement": 0.7213, "kld_vs_other_runtime": 0.00031,
         "floor": _floor(0.00021, "F32", 4), "domains": _domains(0.2652),
         "routing": {"vs_torch_student": _agreement(0.9996), "vs_other_runtime": _agreement(0.9958),
                     "vs_teacher": _agreement(0.770, 0.842)},
         "base_rss_bytes": 94_371_840, "peak_rss_bytes": 111_149_056, "load_seconds": 0.14,
         "prefill_tokens_per_second": 1822.0, "decode_tokens_per_second": 287.1, "repetition": None},
    ]  # fmt: skip


def crashed(report: dict[str, Any], artifact: str) -> dict[str, Any]:
    """The same run when one runtime died: nothing of that row was measured."""
    report = copy.deepcopy(report)
    for row in report["validation"]:
        if row["artifact"] == artifact:
            row.update(dict.fromkeys(row.keys() - {"artifact", "runtime", "runtime_version"}), error=_CRASH)
    report["budget"]["measured"][artifact]["total"] = None
    return report


def only(report: dict[str, Any], artifact: str) -> dict[str, Any]:
    """The same run with one format."""
    report = copy.deepcopy(report)
    other = {"gguf": "onnx", "onnx": "gguf"}[artifact]
    report["artifacts"] = [entry for entry in report["artifacts"] if entry["format"] == artifact]
    report["validation"] = [row for row in report["validation"] if row["artifact"] != other]
    report["verdict"]["checks"] = [c for c in report["verdict"]["checks"] if not c["name"].startswith(other)]
    for part in ("predicted", "measured"):
        del report["budget"][part][other]
    return report


def dense(report: dict[str, Any]) -> dict[str, Any]:
    """The same run when the student is dense: no row of the validation has routing."""
    report = copy.deepcopy(report)
    report["student"] |= {"dense": True, "expert_width": 512, "kept": _kept(6, 32, 4)}
    report["student"] |= dict.fromkeys(("n_experts", "fewest_experts", "n_moe_layers", "top_k"))
    report["load"] = {"teacher": report["load"]["teacher"]}
    for row in report["validation"]:
        row["routing"] = dict.fromkeys(row["routing"])
        if row.get("floor"):
            row["floor"]["same_weights"]["routing"] = None
    checks = report["verdict"]["checks"]
    report["verdict"]["checks"] = [check for check in checks if not check["name"].endswith(".routing")]
    return report


def least() -> dict[str, Any]:
    """The same run with everything absent that can be: nothing pruned, recovered, validated or timed."""
    report = sample_report()
    report["student"].update(n_experts=32, fewest_experts=32, kept=[list(range(32))] * 6)
    report["source"]["license"] = None
    report["budget"].update(predicted={}, measured={})
    report.update(artifacts=[], recovery=[], validation=[], timings={}, peak_rss_bytes={}, environment={}, recipe={})
    report["verdict"] = {"passed": True, "checks": []}
    del report["command"], report["text"], report["load"]
    return report


class Page(HTMLParser):
    """Reads a page: checks that tags nest, and keeps its text, headings, attributes and tables' rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if "h2" in self.open:
            self.headings[-1] += data
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        """Cells of the first table row whose name starts so."""
        return next([cell.strip() for cell in row] for row in self.rows if row[0].startswith(start))


@pytest.fixture
def report() -> dict[str, Any]:
    return sample_report()


@pytest.fixture(
    params=[
        "whole",
        "gguf crashed",
        "onnx crashed",
        "gguf only",
        "onnx only",
        "file budget",
        "one layer",
        "dense",
        "least",
    ]
)
def variant(request: pytest.FixtureRequest, report: dict[str, Any]) -> dict[str, Any]:
    """Runs that differ in what they have."""
    name: str = request.param
    if name.endswith("crashed"):
        return crashed(report, name.split()[0])
    if name.endswith("only"):
        return only(report, name.split()[0])
    if name == "dense":
        return dense(report)
    if name == "file budget":
        report["budget"]["kind"] = "file"
    if name == "one layer":
        report["student"]["kept"] = report["student"]["kept"][:1]
        report["student"]["expert_map"]["layers"] = report["student"]["expert_map"]["layers"][:1]
        for load in report["load"].values():
            load |= {"tokens": load["tokens"][:1], "gate_weight": load["gate_weight"][:1]}
        for row in report["validation"]:
            for agreement in filter(None, row["routing"].values()):
                agreement["per_layer"] = agreement["per_layer"][:1]
    return least() if name == "least" else report


def terminal(report: dict[str, Any]) -> str:
    """The terminal lines at 100 columns."""
    console = Console(width=100, file=io.StringIO(), legacy_windows=False)
    console.print(summary(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("drafted", "ended", "sentence"),
    [
        (2000, None, "was read 14 times for its texts: GGUF drafted 2,000 tokens, of which 75"),
        (0, "it died", "was read 14 times for its texts. Drafting ended early: it died."),
    ],
)
def test_the_page_says_how_often_the_original_was_read_for_its_texts(
    report: dict[str, Any], drafted: int, ended: str | None, sentence: str
) -> None:
    effort = {"passes": 14, "drafted": drafted, "accepted": 3 * drafted // 4, "drafted_by": "gguf"}
    rate = 0.75 if drafted else None
    report["original_texts"] = effort | {"acceptance_rate": rate, "drafting_ended": ended}
    assert sentence in "".join(Page(render_html(report)).text)


def test_page_parses_and_has_every_section_in_order(variant: dict[str, Any]) -> None:
    assert tuple(Page(render_html(variant)).headings) == _SECTIONS


def test_page_asks_for_nothing_from_outside(variant: dict[str, Any]) -> None:
    html = render_html(variant)
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script", html)
    page = Page(html)
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"img", "link", "iframe", "script", "object"})
    assert all(value.startswith("#") for _, name, value in page.attributes if name in ("href", "src"))


def test_outputs_hold_nothing_unprintable(variant: dict[str, Any]) -> None:
    for text in ("".join(Page(render_html(variant)).text), render_model_card(variant), terminal(variant)):
        assert not re.search(r"\b(None|nan|Undefined)\b|\{\{|\{%", text)


def test_equal_reports_give_equal_text(report: dict[str, Any]) -> None:
    again = copy.deepcopy(report)
    assert render_html(report) == render_html(again)
    assert render_model_card(report) == render_model_card(again)


def test_figures_stand_in_the_right_rows(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    assert page.row("GGUF in llama.cpp")[1:] == [
        "49.23 ± 1.18 45.29 to 53.66",
        "+28.2 %",
        "+0.04 %",
        "0.2646 0.2514 to 0.2805 floor 0.0011",
        "0.1641",
        "1.3759",
        "5.5566",
        "72.12 % 70.93 to 73.41 % floor 99.34 %",
    ]
    assert page.row("Original in torch")[1:3] == ["38.41 ± 0.91", numbers.DASH]
    agreement = _agreement(0.9961)
    low, high = (f"{100 * end:.2f}" for end in agreement["overlap_interval"])
    assert page.row("GGUF and the student in torch")[1] == (
        f"{numbers.percent(agreement['overlap'])} {low} to {high} % floor 99.87 %"
    )
    assert page.row("GGUF and the student in torch")[2] == "99.92 % 76.12 % of differing are ties"
    assert page.row("GGUF, routers alone")[1].startswith("99.99 %")
    assert page.row("ONNX and the original")[-1] == "84.20 %"
    assert page.row("router")[1:5] == ["0.5412", "0.3829 \N{MINUS SIGN}29.2 %", "38.29 before 54.12", "accepted"]
    assert page.row("all")[4] == "rejected"
    assert page.row("Measured total")[1:] == ["14.68 MB 14.00 MiB", "15.47 MB 14.75 MiB"]
    assert page.row("onnx/model.onnx.data")[1:] == ["9,887,744 bytes 9.89 MB (9.43 MiB)", "6f" * 32]
    assert page.row("Held-out")[1:] == ["410", "15", "4e" * 32]
    assert page.row("recover")[1] == "21 min 51 s"
    text = "".join(page.text)
    assert report["command"] in text
    assert "types:\n  experts: Q4_0" in text


def test_use_is_told_beside_the_original(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    assert page.row("GGUF beside")[1:] == [
        "23.33 %",
        "not known the original was not run in this runtime",
        "73.81 % 66.00 to 81.00 %",
    ]
    assert page.row("Original in torch, greedy")[1:] == [
        "4.17 % 2.00 to 31.00 %",
        "90.00 % 70.00 to 98.00 %",
        "7.2",
        "41",
    ]
    assert page.row("GGUF in llama.cpp, sampled")[1] == "0.00 % 2.00 to 31.00 %"
    assert "Recovery trained 0.28 % of the parameters (46,080)." in "".join(page.text)
    card = render_model_card(report)
    assert (
        "- GGUF in llama.cpp: 23.33 % of the original's size; decode speed beside the original not known, because the "
        "original was not run in this runtime; finds 31.00 % of 412 last words of sentences and lines, the original "
        "42.00 %; texts that loop: 12.50 % greedy, 0.00 % sampled (the original 4.17 %, 0.00 %)."
    ) in card
    report["against_original"]["files"]["gguf"]["decode_speed_ratio"] = 1.5
    report["against_original"] |= {"trained_parameters": 0, "trained_share": 0.0}
    page = Page(render_html(report))
    assert page.row("GGUF beside")[2] == "1.50x"
    assert "No parameter was trained." in "".join(page.text)
    assert "1.50 times the original's decode speed" in render_model_card(report)


def test_a_small_share_is_not_rounded_away(report: dict[str, Any]) -> None:
    report["against_original"]["trained_share"] = 0.00016
    assert "Recovery trained 0.016 % of the parameters" in render_model_card(report)


def test_all_of_llama_perplexity_s_list_is_there(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    columns = ["Student in torch", "GGUF in llama.cpp", "ONNX in ONNX Runtime"]
    start = next(index for index, row in enumerate(page.rows) if row[1:] == columns)
    rows = {row[0]: row[1:] for row in page.rows[start + 1 : start + 1 + len(STATISTICS)]}
    assert list(rows) == [statistic.name for statistic in STATISTICS]
    assert rows["Mean PPL(Q)"][1] == "49.226000 ± 1.183000"
    assert rows["Mean PPL(base)"] == ["38.412000 ± 0.913000"] * 3
    assert rows["Cor(ln(PPL(Q)), ln(PPL(base)))"][1] == "97.12 %"
    assert rows["Mean KLD"][1] == "0.264600 ± 0.002646"
    assert rows["0.1% KLD"][1] == "0.002646"
    assert rows["Minimum KLD"][1] == "\N{MINUS SIGN}0.000003"
    assert rows["Median Δp"][1] == "0.000 %"
    assert rows["Mean Δp"][1] == "\N{MINUS SIGN}2.130 ± 0.090 %"
    assert rows["Same top p"][1] == "72.120 ± 0.720 %"
    assert not any(numbers.DASH in cells for cells in rows.values())


def test_floors_stand_beside_what_they_bound(report: dict[str, Any]) -> None:
    page, less, dash = Page(render_html(report)), "\N{MINUS SIGN}", numbers.DASH
    assert page.row("llama.cpp, the original in BF16")[3].startswith("0.0011")
    assert page.row("ONNX Runtime, first 4 of 6 layers of the original in F32")[2].startswith(f"{less}0.02 %")
    card = render_model_card(report)
    assert f"| ONNX Runtime, ONNX's weights, 15 chunks | 49.20 | {less}0.02 % ({less}0.09 to +0.04 %) | 0.0002" in card
    lines = terminal(report).splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("Mean divergence"))
    assert re.split(r"\s{2,}", lines[place + 2].strip()) == ["floor of the runtime", dash, dash, "0.0011", "0.0002"]


def test_a_floor_that_was_not_measured_is_not_spoken_of(report: dict[str, Any]) -> None:
    for row in report["validation"]:
        row["floor"] = None
    for text in (render_html(report), render_model_card(report), terminal(report)):
        assert "floor" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL).lower()


def test_an_original_that_crashed_says_so(report: dict[str, Any]) -> None:
    floor = report["validation"][2]["floor"]
    floor["teacher"] = {"type": "BF16", "n_layers": 6, "of_layers": 6, "error": _CRASH}
    assert Page(render_html(report)).row("llama.cpp, the original in BF16")[1] == f"did not run: {_CRASH}"
    assert "llama.cpp, the original" not in render_model_card(report)


def test_domains_are_told_apart_and_the_worst_is_named(report: dict[str, Any]) -> None:
    rows = [row for row in Page(render_html(report)).rows if row[0].startswith(("code", "prose"))]
    assert [row[0] for row in rows] == [
        f"{domain} {model}" for domain in ("code", "prose") for model in ("GGUF in llama.cpp", "ONNX in ONNX Runtime")
    ]
    assert rows[0][1:5] == ["56.00", "40.00", "+40.0 %", "0.3704 0.2381 to 0.4763"]
    assert "| prose | GGUF in llama.cpp | 44.00 | 40.00 | +10.0 % | 0.2911 | 70.00 % |" in render_model_card(report)
    assert "Worst domain: code (ONNX): mean divergence 0.3713 nats, perplexity +40.0 %" in terminal(report)
    for row in report["validation"]:
        row["domains"] = (row.get("domains") or [])[:1]
    for text in (render_html(report), render_model_card(report), terminal(report)):
        assert "domain" not in text.lower().replace("worst-domain", "")


def test_reports_without_intervals_do_not_speak_of_them(report: dict[str, Any]) -> None:
    """A single chunk of text has none."""
    for row in report["validation"]:
        row["perplexity_interval"] = row["top1_agreement_interval"] = None
        if row["kld"]:
            row["kld"]["mean_interval"] = None
        for agreement in filter(None, row["routing"].values()):
            agreement["overlap_interval"] = None
    for text in (render_html(report), render_model_card(report), terminal(report)):
        assert "interval" not in text


def test_failed_checks_come_first(report: dict[str, Any]) -> None:
    html = render_html(report)
    outcomes = re.findall(r"[✓✗] (passed|failed)", html[html.index('id="checks"') :])
    assert outcomes == ["failed", "failed", "passed", "passed", "passed", "passed"]
    assert "Failed 2 of 6 checks" in html
    assert html.index("GGUF: mean divergence from the original: 0.2646 (at most 0.2000)") < html.index('id="budget"')


@pytest.mark.parametrize(
    ("value", "threshold", "passed", "expected"),
    [
        (1.0, 2.0, True, "at most 2"),
        (3.0, 2.0, False, "at most 2"),
        (3.0, 2.0, True, "at least 2"),
        (1.0, 2.0, False, "at least 2"),
        (2.0, 2.0, True, "threshold 2"),
        (None, 2.0, False, "threshold 2"),
        (math.nan, 2.0, False, "threshold 2"),
    ],
)
def test_direction_of_a_check(value: float | None, threshold: float, passed: bool, expected: str) -> None:
    assert facts.requirement({"name": "x", "value": value, "threshold": threshold, "passed": passed}) == expected


@pytest.mark.parametrize(("artifact", "runtime"), [("gguf", "llama.cpp"), ("onnx", "ONNX Runtime")])
def test_crashed_runtime_is_shown_everywhere(report: dict[str, Any], artifact: str, runtime: str) -> None:
    broken = crashed(report, artifact)
    page = Page(render_html(broken))
    assert page.row(f"{artifact.upper()} in {runtime}")[1:] == [f"did not run: {_CRASH}"]
    assert f"{artifact.upper()} in {runtime} did not run" in "".join(page.text)
    assert _CRASH in render_model_card(broken)
    assert " ".join(_CRASH.split()) in " ".join(terminal(broken).split())


def test_texts_of_a_report_are_escaped(report: dict[str, Any]) -> None:
    report["source"]["model"] = "owner/<script>alert(1)</script>"
    report["recipe"] = {"note": "<b>bold</b>"}
    html = render_html(crashed(report, "gguf"))
    assert "<script" not in html and "<b>bold" not in html and "<blk.0>" not in html
    Page(html)


def test_absent_format_is_not_mentioned(report: dict[str, Any]) -> None:
    for text in (render_html(only(report, "gguf")), render_model_card(only(report, "gguf"))):
        assert "ONNX in ONNX Runtime" not in text and "model.onnx" not in text
    page = Page(render_html(only(report, "gguf")))
    assert page.row("Budget") == ["Budget", "16.00 MB 15.26 MiB"]


def test_rungs_that_were_not_kept_say_why(report: dict[str, Any]) -> None:

    failed = _rung("all", "kd", 1e9, 0.4, 0.4, False) | {
        "selection_kld_after": None,
        "selection_perplexity_after": None,
    }
    report["recovery"] = [
        {"rung": "all", "loss": "kd", "why": "training it needs 90 GB"},
        failed | {"why": "the loss is NaN"},
    ]
    page = Page(render_html(report))
    refused, rejected = ([cell.strip() for cell in row] for row in page.rows if row[0].startswith("all"))
    dash = numbers.DASH
    assert refused[1:6] == [dash, dash, dash, "refused training it needs 90 GB", dash]
    assert rejected[1:5] == ["0.4000", dash, dash, "rejected the loss is NaN"]
    card = render_model_card(report)
    assert "refused (training it needs 90 GB)" in card
    assert "rejected (the loss is NaN)" in card


def test_nothing_pruned_or_recovered_is_said() -> None:
    html = render_html(least())
    assert "Nothing was pruned: all 32 experts" in html
    assert "No recovery was run" in html
    assert "Built; nothing was checked" in html
    assert '<path class="kept"' not in html


def test_a_dense_student_is_called_so_and_its_routing_left_out(report: dict[str, Any]) -> None:
    report = dense(report)
    left = "one dense feed-forward per layer (512 wide, from 4 of 32 experts)"
    assert facts.what_is_left(report) == left
    page, card, lines = Page(render_html(report)), render_model_card(report), terminal(report)
    text = " ".join(page.text)
    assert f"Of the original: {left}. Filled:" in text and "The student is dense" in text
    assert "Same routing" not in text and "Overlap" not in text and "Not measured" not in text
    assert charts.routing_charts(report) == []
    assert f"Of the original: {left}: a dense model, without routers." in card
    assert "| | Median divergence | 99 % | Maximum | Same top token |\n|---|---:|---:|---:|---:|\n| Student" in card
    assert "outing" not in card.replace("without routers", "") + lines
    assert yaml.safe_load(card.split("---\n", 2)[1])["tags"] == [
        "gguf", "onnx", "dense", "qwen3_moe", "quantized", "pruned",
    ]  # fmt: skip
    report["student"]["n_layers"] = 5
    assert facts.what_is_left(report) == f"5 of 6 layers, {left}"


def test_grid_shows_exactly_the_kept_experts(report: dict[str, Any]) -> None:
    grid = charts.expert_grid(report)
    assert grid is not None
    cells = {
        (int(layer), expert)
        for first, layer, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", grid.kept)
        for expert in range(int(first), int(first) + int(width))
    }
    assert cells == {(layer, expert) for layer, kept in enumerate(report["student"]["kept"]) for expert in kept}
    assert charts.kept_ranges([9, 0, 1, 2, 5, 8]) == "0-2, 5, 8-9"


def test_loads_are_shown_before_and_after(report: dict[str, Any]) -> None:
    page = render_html(report)
    assert "Before: the original" in page and "After: the GGUF" in page
    rows = [[cell.strip() for cell in row] for row in Page(page).rows]
    assert ["Student", "1.04", "6.0 even shares", "6 of 144"] in rows
    without = Page(render_html(least()))
    assert "Before: the original" not in "".join(without.text)
    of_dense = render_html(dense(report))
    assert "Before: the original" not in of_dense and "it has no experts to choose from" in of_dense


def test_lines_lie_inside_their_axes(report: dict[str, Any]) -> None:
    export, compression = charts.routing_charts(report)
    assert [series.kind for series in export.series] == ["gguf", "onnx", "cross"]
    for chart in (export, compression):
        assert chart.y_ticks[0].label.startswith("100")
        assert len(chart.y_ticks) <= 6
        lowest = chart.y_ticks[-1].at
        assert lowest == pytest.approx(chart.height)
        for series in chart.series:
            assert len(series.points) == 6
            assert all(0 <= x <= 100 and 0 <= y <= lowest + 1e-6 for x, y, _ in series.points)
    # Heights are proportional to the values: layer by layer, below 1.
    values = [layer["overlap"] for layer in report["validation"][1]["routing"]["vs_teacher"]["per_layer"]]
    heights = [y for _, y, _ in compression.series[0].points]
    assert [h / heights[0] for h in heights] == pytest.approx([(1 - v) / (1 - values[0]) for v in values])


@pytest.mark.parametrize("overlap", [1.0, 0.9999, 0.8, 0.31, 0.0])
def test_axis_holds_any_agreement(report: dict[str, Any], overlap: float) -> None:
    for row in report["validation"]:
        for agreement in filter(None, row["routing"].values()):
            for layer in agreement["per_layer"]:
                layer["overlap"] = overlap
    for chart in charts.routing_charts(report):
        assert 3 <= len(chart.y_ticks) <= 6
        assert all(0 <= y <= chart.height + 1e-6 for series in chart.series for _, y, _ in series.points)


def test_divergence_axis_is_logarithmic_and_ordered(report: dict[str, Any]) -> None:
    chart = charts.divergence_chart(report)
    assert chart is not None
    assert [row.artifact for row in chart.rows] == ["student", "gguf", "onnx"]
    for row in chart.rows:
        assert 0 <= row.median < row.mean < row.p99 < row.maximum <= 100
    steps = [after.at - before.at for before, after in zip(chart.ticks, chart.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    exact = copy.deepcopy(report)
    for row in exact["validation"]:
        row["kld"] = row["kld"] and dict.fromkeys(row["kld"], 0.0)
    assert charts.divergence_chart(exact) is None


def test_bars_show_the_budget(report: dict[str, Any]) -> None:
    gguf, onnx = charts.budget_bars(report)
    assert not gguf.over and not onnx.over
    assert sum(segment.width for segment in gguf.segments) / gguf.budget == pytest.approx(14_894_848 / 16_000_000)
    report["budget"]["measured"]["gguf"]["total"] = 16_000_001
    assert charts.budget_bars(report)[0].over
    report["budget"]["kind"] = "file"
    (segment,) = charts.budget_bars(report)[0].segments
    assert segment.n_bytes == 9_914_112


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(0.004, "6-bit"), (0.007, "between"), (0.03, "range of 4-bit"), (0.08, "more than 4-bit"), (0.3, "visibly")],
)
def test_bands(mean: float, expected: str) -> None:
    assert expected in facts.band(mean)


def test_model_card_front_matter(report: dict[str, Any]) -> None:
    _, front_matter, body = render_model_card(report).split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "license": "apache-2.0",
        "base_model": "example-org/Fine-21M-MoE",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "onnx", "moe", "mixture-of-experts", "qwen3_moe", "quantized", "pruned"],
    }
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        "## Files",
        "## What it is worth in use",
        "## How it was made",
        "## Run",
        "## Limits",
    ]
    assert "| `Fine-24x0.9M-Q4_0.gguf` | Q4_0 | 9,914,112 | 9.91 MB (9.45 MiB) | 4.80 |" in body


def test_model_card_says_which_types_and_which_projector(report: dict[str, Any]) -> None:
    report["artifacts"][0]["tensor_types"] = {"gate of the experts": {"Q2_K": 5, "Q3_K": 1}, "head": {"Q6_K": 1}}
    report["source"] |= {"projector": {"part": "the part that sees images", "width": 2048}}
    report["source"] |= {"license": "other", "license_name": "nvidia-open", "license_link": "LICENSE"}
    report["source"] |= {"license_files": ["LICENSE", "NOTICE"]}
    card = render_model_card(report)
    assert "| gate of the experts | Q2_K x 5, Q3_K x 1 |\n| head | Q6_K |\n" in card
    assert "older releases" not in card
    report["artifacts"][0]["tensor_types"]["head"] = {"Q2_0": 1}
    assert "older releases, and programs with one, refuse the file" in render_model_card(report)
    assert "has the part that sees images" in card and "2,048 wide" in card
    assert "llama-server -m Fine-24x0.9M-Q4_0.gguf --mmproj FILE" in card
    front_matter = yaml.safe_load(card.split("---\n", 2)[1])
    assert [front_matter[key] for key in ("license", "license_name", "license_link")] == [
        *("other", "nvidia-open", "LICENSE")
    ]
    assert "applies: nvidia-open. Its text is in `LICENSE`, `NOTICE`." in card
    only_onnx = only(report, "onnx")
    assert "mmproj" not in render_model_card(only_onnx)


def test_model_card_has_lines_for_the_clients_of_onnx_files(report: dict[str, Any]) -> None:
    card = render_model_card(report)
    for client in ("onnxruntime-genai", "optimum"):
        code = card.split(f"\n{client}:\n")[1].split("```python\n")[1].split("```")[0]
        compile(code, client, "exec")
    report["source"]["n_recurrent_layers"] = 2
    assert "\noptimum:\n" not in render_model_card(report), "it keeps keys and values alone"


def test_model_card_lists_each_rung_on_its_line(report: dict[str, Any]) -> None:
    lines = render_model_card(report).splitlines()
    rungs = [line for line in lines if "): divergence " in line]
    assert len(rungs) == len(report["recovery"])
    for line, rung in zip(rungs, report["recovery"], strict=True):
        assert line.startswith(f"- {rung['rung']} (")
        assert line.endswith(f"({rung['why']})" if rung.get("why") else facts.rung_outcome(rung))
    assert lines[lines.index(rungs[-1]) + 1] == ""


def test_model_card_of_a_local_model_names_no_page(report: dict[str, Any]) -> None:
    report["source"].update(model="/somewhere/models/mine", license=None)
    card = render_model_card(report)
    front_matter = yaml.safe_load(card.split("---\n", 2)[1])
    assert front_matter.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "the original does not state one" in card


def test_tables_of_the_card_are_rectangular(variant: dict[str, Any]) -> None:
    columns: int | None = None
    for line in render_model_card(variant).splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        columns = columns or line.count("|")
        assert line.count("|") == columns


def test_summary_fits_and_says_the_verdict(variant: dict[str, Any]) -> None:
    lines = terminal(variant).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    assert facts.verdict_title(variant) in lines


def test_summary_figures(report: dict[str, Any]) -> None:
    lines = {line[:26].strip(): line[26:].split() for line in terminal(report).splitlines()}
    assert lines["Perplexity"] == ["38.41", "49.21", "49.23", "49.21"]
    assert lines["Mean divergence, nats"][1:] == ["0.2641", "0.2646", "0.2652"]
    assert lines["Memory at full context"][2:] == ["14.68", "MB", "15.47", "MB"]


def test_ollamas_lines_write_a_modelfile(report: dict[str, Any], tmp_path: Path) -> None:
    """Only the first line is run here; the other two are Ollama's."""
    first, *others = ollama_commands(report, Path("it's 50%.gguf")).splitlines()
    subprocess.run(["sh", "-c", first], cwd=tmp_path, check=True)
    assert (tmp_path / "Modelfile").read_text() == "FROM ./it's 50%.gguf\nPARAMETER num_ctx 2048\n"
    assert [shlex.split(line)[1:3] for line in others] == [["create", "it's 50%"], ["run", "it's 50%"]]
    merge, first, *_ = ollama_commands(report, Path("a b-00001-of-00003.gguf"), n_parts=3).splitlines()
    assert shlex.split(merge) == ["llama-gguf-split", "--merge", "a b-00001-of-00003.gguf", "a b.gguf"]
    assert "FROM ./a b.gguf" in first
    assert "ollama create" in render_model_card(report) and "lms import" in render_model_card(report)


def test_run_instructions_can_be_pasted(report: dict[str, Any]) -> None:
    report["budget"]["kv_type"] = "q8_0"
    text = run_instructions(report, Path("my models"))
    assert "llama-cli -m 'my models/Fine-24x0.9M-Q4_0.gguf' -c 2048 -ctk q8_0 -ctv q8_0 -p \"The history of\"\n" in text
    example = text.split("Run the ONNX folder")[1].split("\n", 1)[1]
    assert len(example.splitlines()) == 3
    compile(example, "example", "exec")
    assert '"my models/onnx/model.onnx"' in example
    code = shlex.split(next(line for line in text.splitlines() if line.startswith("python -c")))[2]
    compile(code, "one-liner", "exec")
    assert 'Llama("my models/Fine-24x0.9M-Q4_0.gguf", n_ctx=2048' in code
    assert run_instructions(least(), Path("out")) == ""


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (999, "999 B"),
        (20_000_000_000, "20.00 GB (18.63 GiB)"),
        (999_999_999, "1.00 GB (953.67 MiB)"),
        (1_000, "1.00 KB (1,000 B)"),
        (None, numbers.DASH),
    ],
)
def test_sizes(n_bytes: int | None, expected: str) -> None:
    assert numbers.size(n_bytes) == expected


def test_numbers_do_not_round_away_what_matters() -> None:
    assert numbers.percent(0.999999) == "> 99.99 %"
    assert numbers.percent(1.0) == "100.00 %"
    assert numbers.divergence(0.00001) == "< 0.0001"
    assert numbers.divergence(0.0) == "0.0000"
    assert numbers.divergence(-0.00001) == "< 0.0001"
    assert numbers.divergence(-0.0) == "0.0000"
    assert numbers.percent(-0.000001) == "0.00 %"
    assert numbers.change(10.0, 9.9999999) == "0.00 %"
    assert numbers.fixed(-0.0000004, 3, 100.0) == "0.000"
    assert numbers.fixed(-0.00028, 3, 100.0, 0.00021) == "\N{MINUS SIGN}0.028 ± 0.021"
    assert [numbers.duration(s) for s in (0.42, 59.7, 200, 7500)] == ["0.4 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
    assert numbers.change(10.0, 9.0) == "\N{MINUS SIGN}10.0 %"
    assert numbers.plain(0.00012) == "1.20e-04"
    assert numbers.perplexity(math.nan) == numbers.DASH


@pytest.mark.parametrize(
    ("student", "left"),
    [
        ({}, "24 of 32 experts per layer"),
        ({"merged": True}, "32 experts per layer merged into 24"),
        ({"n_experts": 32, "fewest_experts": 32, "expert_width": 96}, "all 32 experts, experts 96 of 128 wide"),
        ({"n_layers": 5, "n_moe_layers": 5}, "5 of 6 layers, 24 of 32 experts per layer"),
        ({"n_moe_layers": 4}, "6 of 6 layers, experts in 4 of them, 24 of 32 experts per layer"),
        ({"fewest_experts": 19}, "19 to 24 of 32 experts per layer"),
    ],
)
def test_what_is_left_is_said_in_words(report: dict[str, Any], student: dict[str, Any], left: str) -> None:
    report["student"] |= student
    assert facts.what_is_left(report) == left


@pytest.mark.parametrize(
    ("student", "left"),
    [
        ({"n_moe_layers": 5}, "24 of 32 experts per layer"),
        ({"n_moe_layers": 4}, "6 of 6 layers, experts in 4 of them, 24 of 32 experts per layer"),
        ({"n_layers": 5, "n_moe_layers": 4}, "5 of 6 layers, 24 of 32 experts per layer"),
    ],
)
def test_layers_that_never_had_experts_have_lost_none(
    report: dict[str, Any], student: dict[str, Any], left: str
) -> None:
    report["source"]["n_moe_layers"] = 5
    report["student"] |= student
    assert facts.what_is_left(report) == left


@pytest.mark.parametrize(
    ("compress", "said"),
    [
        ({"edit": "none", "replaced": None, "bases": None}, ""),
        (
            {"edit": "lightmoe", "replaced": 146, "bases": 36},
            ", 146 of them written whole from 36 shared bases and adapters",
        ),
        (
            {"edit": "lightmoe", "replaced": [0, 4, 6], "bases": [0, 1, 2]},
            ", 10 of them written whole from 3 shared bases and adapters",
        ),
        ({"edit": "svd", "replaced": None, "bases": None}, ", rewritten by svd"),
    ],
)
def test_experts_with_other_values_are_said_to_have_them(
    report: dict[str, Any], compress: dict[str, Any], said: str
) -> None:
    """Without a word on it a card of multiplied-out experts would read as if they were the original's."""
    report["student"] |= {"n_experts": 32, "fewest_experts": 32}
    report["recipe"] = {"compress": compress}
    assert facts.what_is_left(report) == f"all 32 experts{said}"
    layers = [{"source": 0, "shared": {"base_of": [0, 0, None, 1, 1], "bases": 2, "rank": 8}}]
    report["student"]["expert_map"] = {"layers": layers}
    assert facts.what_is_left(report) == "all 32 experts, 4 of them on 2 shared bases"


def test_a_layer_without_experts_is_no_sign_of_pruning(report: dict[str, Any]) -> None:
    report["student"]["kept"] = [None, *_kept(5, 32, 32)]
    assert charts.expert_grid(report) is None
    report["student"]["kept"] = [None, *_kept(5, 32, 24)]
    grid = charts.expert_grid(report)
    assert grid is not None and " 0h" not in grid.kept
    html = render_html(report)
    assert "<dt>layer 0</dt><dd>has no experts</dd>" in html

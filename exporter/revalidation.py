"""``moe-export validate OUT``: are the published files what the report says, and do they still work?"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from compressors.calibration import tokenize_heldout
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.log_probs import LogProbReader, LogProbWriter
from compressors.model.recorder import RoutingRecorder
from compressors.model.routing import Routing
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import ExpertMap, Student
from compressors.teacher import write_log_probs
from exporter.hub import bundled_text, resolve_model
from exporter.job import parse_requirements
from exporter.outputs import sha256_of
from validate.backend import RuntimeBackend, scored_positions
from validate.evaluation import divergence, evaluate, perplexity
from validate.llama_cpp import LlamaCppBackend
from validate.onnx_runtime import OnnxRuntimeBackend
from validate.routing_agreement import routing_agreement
from validate.verdict import Check

__all__ = ["revalidate", "revalidation_table"]

_SAME_TEXT_TOLERANCE = 0.001  # of perplexity, on the text that the report was made with


@dataclass(frozen=True)
class _Reference:
    """The teacher on the held-out chunks."""

    chunks_BT: torch.Tensor
    text_sha256: str
    log_probs: LogProbReader
    routing: Routing
    perplexity: float


def revalidate(
    out: Path,
    *,
    against: str | None = None,
    text: Path | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    require: Iterable[str] = (),
) -> dict[str, Any]:
    """Measures the files of an output folder again.

    Args:
        out: a folder that a run published.
        against: the original model; None for the one that the report names.
        text: held-out text; None for the bundled one.
        threads: of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.
        require: thresholds ``kld=VALUE`` and ``top1=VALUE``.

    Returns:
        ``passed``, ``perplexity_teacher``, ``rows`` (one per artifact) and ``checks``, as plain data.

    Raises:
        InputError: the folder is not one of ours, or the model is not the one it was made from.
    """
    report = _read_report(out)
    thresholds = parse_requirements(require, allowed=("kld", "top1"))
    n_threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    source = _source(report, against)
    checks = [Check.at_most("files changed", _changed_files(out), 0)]
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        reference = _teacher(source, text or bundled_text("heldout"), report, Path(folder))
        rows = []
        for artifact in report["artifacts"]:
            backend = _open(artifact["format"], out / artifact["path"], n_threads, gpu_layers)
            row, found = _measure(artifact["format"], backend, reference, report, thresholds)
            rows.append(row)
            checks += found
    return {
        "passed": all(check.passed for check in checks),
        "perplexity_teacher": reference.perplexity,
        "rows": rows,
        "checks": [asdict(check) for check in checks],
    }


def revalidation_table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    verdict = "passed" if result["passed"] else "FAILED"
    table = Table(
        "artifact", "runtime", "perplexity", "divergence", "same top token", "routing vs teacher", title=verdict
    )
    table.add_row("teacher", "torch", f"{result['perplexity_teacher']:.2f}", "", "", "")
    for row in result["rows"]:
        table.add_row(
            row["artifact"],
            row["runtime"],
            f"{row['perplexity']:.2f}",
            f"{row['kld']['mean']:.4f}",
            f"{row['top1_agreement']:.1%}",
            "" if row["routing_overlap_vs_teacher"] is None else f"{row['routing_overlap_vs_teacher']:.3f}",
        )
    for check in result["checks"]:
        if not check["passed"]:
            table.add_row(f"failed: {check['name']}", f"{check['value']} against {check['threshold']}", "", "", "", "")
    return table


def _read_report(out: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{out} has no readable report.json; give the output folder of a finished run") from None
    return report


def _source(report: dict[str, Any], against: str | None) -> Checkpoint:
    model = against or report["job"]["model"]
    checkpoint = Checkpoint(resolve_model(model, report["job"]["revision"], offline=False))
    if checkpoint.identity() != report["source"]["identity"]:
        raise InputError(f"--against: {checkpoint.folder} is not the model that these files were made from")
    return checkpoint


def _changed_files(out: Path) -> int:
    """How many files of SHA256SUMS are missing or have another hash."""
    try:
        lines = (out / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(f"{out} has no SHA256SUMS; give the output folder of a finished run") from None
    entries = [line.split("  ", 1) for line in lines]
    return sum(not (out / name).is_file() or sha256_of(out / name) != digest for digest, name in entries)


def _teacher(source: Checkpoint, text: Path, report: dict[str, Any], folder: Path) -> _Reference:
    split, blocks = tokenize_heldout(text, source.folder)
    chunks = blocks.leading(report["recipe"]["text"]["heldout_chunks_per_file"]).tokens_BT
    model = StreamedModel(Student.teacher(source))
    recorder = RoutingRecorder(model.shape)
    (hidden,) = model.stream([TokenGroup(chunks, [recorder.observe])])
    scored = scored_positions(chunks.shape[1])
    n_scored = len(chunks) * (scored.stop - scored.start)
    writer = LogProbWriter(folder / "teacher", n_scored, source.shape.vocab_size)
    likelihoods = write_log_probs(model, chunks, hidden, scored, writer, range(len(chunks)))
    log_probs = LogProbReader(folder / "teacher")
    return _Reference(chunks, split.sha256, log_probs, recorder.routing(), perplexity(likelihoods.numpy())[0])


def _open(artifact: str, path: Path, threads: int, gpu_layers: int) -> RuntimeBackend:
    if artifact == "gguf":
        return LlamaCppBackend(path, threads=threads, gpu_layers=gpu_layers)
    return OnnxRuntimeBackend(path, threads=threads)


def _measure(
    artifact: str,
    backend: RuntimeBackend,
    reference: _Reference,
    report: dict[str, Any],
    thresholds: dict[str, float],
) -> tuple[dict[str, Any], list[Check]]:
    evaluation = evaluate(backend, reference.chunks_BT.numpy(), {"teacher": reference.log_probs})
    experts = ExpertMap.from_json(report["student"]["expert_map"])
    row: dict[str, Any] = {
        "artifact": artifact,
        "runtime": backend.runtime,
        "perplexity": perplexity(evaluation.negative_log_likelihood_N)[0],
        "kld": asdict(divergence(evaluation.kl_divergence_N["teacher"])),
        "top1_agreement": float(evaluation.same_top_N["teacher"].mean()),
        "routing_overlap_vs_teacher": None
        if evaluation.routing is None  # of a dense student
        else routing_agreement(reference.routing, evaluation.routing, experts).mean("overlap"),
    }
    checks = []
    if reference.text_sha256 == report["text"]["heldout"]["sha256"]:
        (reported,) = (entry["perplexity"] for entry in report["validation"] if entry["artifact"] == artifact)
        change = None if reported is None else abs(row["perplexity"] / reported - 1)
        checks.append(Check.at_most(f"{artifact}.perplexity_as_reported", change, _SAME_TEXT_TOLERANCE))
    if "kld" in thresholds:
        checks.append(Check.at_most(f"{artifact}.kld", row["kld"]["mean"], thresholds["kld"]))
    if "top1" in thresholds:
        checks.append(Check.at_least(f"{artifact}.top1", row["top1_agreement"], thresholds["top1"]))
    return row, checks

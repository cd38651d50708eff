"""``moe-export validate OUT``: are the published files what the report says, and do they still work?"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from compressors.calibration import tokenize_heldout
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.recorder import RoutingRecorder
from compressors.model.routing import Routing
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import ExpertMap, Student
from compressors.teacher import write_log_probs
from exporter.hub import bundled_text, resolve_model
from exporter.job import parse_requirements
from exporter.outputs import sha256_of
from validate.backend import RuntimeBackend, scored_positions
from validate.bootstrap import CONFIDENCE
from validate.evaluation import evaluate
from validate.figures import fidelity_figures
from validate.llama_cpp import LlamaCppBackend
from validate.logits_file import LogitsFile, LogitsFileWriter
from validate.onnx_runtime import OnnxRuntimeBackend
from validate.positions import ReferenceLogProbs
from validate.report import numbers
from validate.routing_agreement import routing_agreement
from validate.verdict import Check

__all__ = ["revalidate", "revalidation_table"]

_SAME_TEXT_TOLERANCE = 0.001  # of perplexity, on the text that the report was made with


@dataclass(frozen=True)
class _Reference:
    """The teacher on the held-out chunks."""

    chunks_BT: npt.NDArray[np.int64]
    log_probs: ReferenceLogProbs
    text_sha256: str | None  # None if only its tokens are known
    routing: Routing | None  # None if somebody else wrote its log-probabilities


def revalidate(
    out: Path,
    *,
    against: str | None = None,
    text: Path | None = None,
    reference_logits: Path | None = None,
    save_reference_logits: Path | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    require: Iterable[str] = (),
) -> dict[str, Any]:
    """Measures the files of an output folder again.

    Args:
        out: a folder that a run published.
        against: the original model; None for the one that the report names.
        text: held-out text; None for the bundled one.
        reference_logits: a logits file of llama-perplexity that stands for the original and its text.
        save_reference_logits: where to write such a file of the original, for llama-perplexity and later runs.
        threads: of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.
        require: thresholds ``kld=VALUE`` and ``top1=VALUE``.

    Returns:
        ``passed``, ``perplexity_teacher``, ``rows`` (one per artifact) and ``checks``, as plain data.

    Raises:
        InputError: the folder is not one of ours, the model is not the one it was made from, or the logits file is
            damaged or of another vocabulary.
    """
    report = _read_report(out)
    thresholds = parse_requirements(require, allowed=("kld", "top1"))
    n_threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    checks = [Check.at_most("files changed", _changed_files(out), 0)]
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        if reference_logits is None:
            source = _source(report, against)
            logits_file = save_reference_logits or Path(folder) / "teacher"
            reference = _teacher(source, text or bundled_text("heldout"), report, logits_file)
        elif against or text or save_reference_logits:
            raise InputError(
                "--reference-logits holds original and text: leave out --against, --text and --save-reference-logits"
            )
        else:
            reference = _stored(reference_logits)
        rows = []
        for artifact in report["artifacts"]:
            n_tokens = reference.chunks_BT.shape[1]
            backend = _open(artifact["format"], out / artifact["path"], n_tokens, n_threads, gpu_layers)
            row, found = _measure(artifact["format"], backend, reference, report, thresholds)
            rows.append(row)
            checks += found
    return {
        "passed": all(check.passed for check in checks),
        "perplexity_teacher": rows[0]["perplexity_vs_teacher"]["base"],
        "rows": rows,
        "checks": [asdict(check) for check in checks],
    }


def revalidation_table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    verdict = "passed" if result["passed"] else "FAILED"
    table = Table(
        "artifact", "runtime", "perplexity", "divergence", "same top token", "routing vs teacher", title=verdict
    )
    table.add_row("teacher", "torch", numbers.perplexity(result["perplexity_teacher"]), "", "", "")
    for row in result["rows"]:
        figures = (
            (numbers.perplexity(row["perplexity"]), numbers.interval(row["perplexity_interval"], numbers.perplexity)),
            (numbers.divergence(row["kld"]["mean"]), numbers.interval(row["kld"]["mean_interval"], numbers.divergence)),
            (numbers.percent(row["top1_agreement"]), numbers.interval(row["top1_agreement_interval"], numbers.percent)),
            (
                numbers.percent(row["routing_overlap_vs_teacher"]),
                numbers.interval(row["routing_overlap_interval"], numbers.percent),
            ),
        )
        table.add_row(row["artifact"], row["runtime"], *("\n".join(filter(None, figure)) for figure in figures))
    if any(row["perplexity_interval"] for row in result["rows"]):
        table.caption = f"second lines: {100 * CONFIDENCE:.0f} % intervals (block bootstrap over chunks)"
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


def _teacher(source: Checkpoint, text: Path, report: dict[str, Any], logits_file: Path) -> _Reference:
    """Runs the original, and writes its log-probabilities into the file."""
    split, blocks = tokenize_heldout(text, source.folder)
    chunks = blocks.leading(report["recipe"]["text"]["heldout_chunks_per_file"]).tokens_BT
    writer = LogitsFileWriter(logits_file, chunks.numpy(), source.shape.vocab_size)
    model = StreamedModel(Student.teacher(source))
    recorder = RoutingRecorder(model.shape)
    (hidden,) = model.stream([TokenGroup(chunks, [recorder.observe])])
    write_log_probs(model, chunks, hidden, scored_positions(chunks.shape[1]), writer, range(len(chunks)))
    return _Reference(chunks.numpy(), LogitsFile(logits_file), split.sha256, recorder.routing())


def _chunks_for(backend: RuntimeBackend, reference: _Reference) -> npt.NDArray[np.int64]:
    """The chunks with BOS where llama-perplexity puts it; its file has the text's own token there."""
    chunks_BT = reference.chunks_BT
    if reference.text_sha256 is None and backend.bos_token is not None:
        chunks_BT = chunks_BT.copy()
        chunks_BT[:, 0] = backend.bos_token
    return chunks_BT


def _stored(path: Path) -> _Reference:
    """What somebody's llama-perplexity, or an earlier run, said about the original."""
    log_probs = LogitsFile(path)
    return _Reference(log_probs.tokens_BT, log_probs, None, None)


def _open(artifact: str, path: Path, n_tokens: int, threads: int, gpu_layers: int) -> RuntimeBackend:
    if artifact == "gguf":
        return LlamaCppBackend(path, n_ctx=n_tokens, threads=threads, gpu_layers=gpu_layers)
    return OnnxRuntimeBackend(path, threads=threads)


def _measure(
    artifact: str,
    backend: RuntimeBackend,
    reference: _Reference,
    report: dict[str, Any],
    thresholds: dict[str, float],
) -> tuple[dict[str, Any], list[Check]]:
    evaluation = evaluate(backend, _chunks_for(backend, reference), {"teacher": reference.log_probs})
    row: dict[str, Any] = {"artifact": artifact, "runtime": backend.runtime} | fidelity_figures(evaluation, "teacher")
    row["routing_overlap_vs_teacher"] = row["routing_overlap_interval"] = None
    if reference.routing is not None and evaluation.routing is not None:  # a dense student has none
        experts = ExpertMap.from_json(report["student"]["expert_map"])
        agreement = routing_agreement(reference.routing, evaluation.routing, experts, n_chunks=evaluation.n_chunks)
        row["routing_overlap_vs_teacher"] = agreement.mean("overlap")
        row["routing_overlap_interval"] = agreement.overlap_interval
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

"""Gathers the stages' results into the report's plain data: the content of report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.sources.student import ExpertMap
from exporter.estimating.budget import expert_bits
from exporter.estimating.planned_types import planned_block_length, same_numbers
from exporter.file_names import (
    EVALUATION,
    GENERATION,
    LAST_WORDS,
    MEASUREMENT,
    RECOVERY,
    ROUTING,
    SUMMARY,
    TEXT_EFFORT,
)
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.publishing.against_original import against_original, with_choices
from exporter.publishing.described_models import described_source, described_student, stored_bytes
from exporter.publishing.environment import environment
from exporter.publishing.floors import floors_of
from exporter.publishing.outputs import Artifact
from exporter.publishing.search_figures import named_types, search_figures
from exporter.publishing.type_mix import type_mix
from exporter.stages.finished import heldout_domains, scheduled_blocks, student_of_files
from exporter.work.directory import StageRecord, WorkDirectory
from validate.metrics.cloze import cloze_figures, load_last_words
from validate.metrics.domains import domain_figures
from validate.metrics.evaluation import Evaluation
from validate.metrics.figures import fidelity_figures
from validate.metrics.generation import largest_share_by_chance
from validate.metrics.statistics import perplexity
from validate.metrics.verdict import Check, Figures, band_of, required_checks
from validate.routing.agreement import routing_agreement
from validate.routing.load import expert_load, load_figures
from validate.routing.ties import find_ties

__all__ = ["build_report", "final_recipe"]

_SCHEMA = 1
_RUNTIMES = {"gguf": "llama.cpp", "onnx": "onnxruntime"}


def final_recipe(plan: Plan, work: WorkDirectory) -> Recipe:
    """The recipe with the numbers of blocks that the time limit of recovery allowed."""
    choice = plan.recipe.recover
    trained = [
        rung.model_copy(update={"blocks": n_blocks})
        for rung, n_blocks in zip(choice.trained, scheduled_blocks(work), strict=True)
    ]
    after_quantizing = trained.pop() if choice.after_quantizing is not None else None
    recover = choice.model_copy(update={"rungs": tuple(trained), "after_quantizing": after_quantizing})
    return plan.recipe.model_copy(update={"recover": recover})


def build_report(
    plan: Plan, work: WorkDirectory, records: Mapping[str, StageRecord], artifacts: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Everything that the report says, as data for JSON."""
    recipe = final_recipe(plan, work)
    source = plan.open_source()
    experts = student_of_files(plan, work).experts
    student_spec = experts.spec_of(source.spec)
    summary = json.loads(work.path("calibrate", SUMMARY).read_text(encoding="utf-8"))
    rows = _Rows(plan, work, records, experts, summary["teacher"])
    validation = [rows.teacher(), rows.student(), *(rows.artifact(name) for name in artifacts)]
    checks = _checks(plan, artifacts, {row["artifact"]: row for row in validation})
    tried = _tried(plan, work)
    return {
        "schema": _SCHEMA,
        "tool": {"name": "moe-export", "version": version("moe-export")},
        "command": plan.command,
        "source": described_source(recipe.source, source),
        "recipe": recipe.model_dump(),
        "text": summary["text"],
        "deviations": [asdict(deviation) for deviation in plan.deviations],
        "student": described_student(source.spec, experts),
        "budget": _budget(plan, artifacts, {row["artifact"]: row for row in validation}),
        "artifacts": [
            {
                "format": name,
                "path": artifact.path,
                "files": {file: asdict(entry) for file, entry in artifact.files.items()},
                "bytes": artifact.bytes,
                "bits_per_weight": 8 * artifact.bytes / student_spec.parameters,
                "type": named_types(recipe.file(name)),
                "tensor_types": type_mix(recipe.file(name), student_spec) if name == "gguf" else None,
            }
            for name, artifact in artifacts.items()
        ],
        "recovery": [asdict(refused) for refused in plan.refused_rungs] + tried,
        "search": search_figures(work, source.spec, recipe),
        "against_original": against_original(
            artifacts,
            stored_bytes(source),
            validation,
            with_choices(recipe.recover, tried),
            student_spec,
            [planned_block_length(recipe, artifact, student_spec) for artifact in recipe.artifacts],
        ),
        "validation": validation,
        "original_texts": _text_effort(work),
        "load": rows.load(),
        "verdict": {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]},
        "timings": {name: record.seconds for name, record in records.items()},
        "peak_rss_bytes": {name: record.peak_rss_bytes for name, record in records.items()},
        "source_bytes_read": {name: record.source_bytes for name, record in records.items()},
        "environment": environment(recipe.threads),
    }


def _tried(plan: Plan, work: WorkDirectory) -> list[dict[str, Any]]:
    """The results of the recipe's rungs."""
    stages = ["recover"] if plan.recipe.recover.after_quantizing is None else ["recover", "retune"]
    return [result for stage in stages for result in json.loads(work.path(stage, RECOVERY).read_text(encoding="utf-8"))]


class _Rows:
    """The validation table: one row per model and runtime."""

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        records: Mapping[str, StageRecord],
        experts: ExpertMap,
        teacher: Mapping[str, Any],
    ) -> None:
        self._plan = plan
        self._work = work
        self._records = records
        self._experts = experts
        self._teacher = teacher
        self._teacher_routing = RoutingRecord.load(work.path("calibrate", ROUTING))
        self._domains = heldout_domains(work)
        self._last_words = load_last_words(work.path("calibrate", LAST_WORDS))
        self._evaluations = {
            artifact: self._load(f"validate_{stage}")
            for artifact, stage in (("student", "torch"), ("gguf", "gguf"), ("onnx", "onnx"))
        }

    def teacher(self) -> dict[str, Any]:
        """The original in torch; it is its own reference."""
        path = self._work.path("teacher_texts", GENERATION)
        generation = _generation(json.loads(path.read_text(encoding="utf-8")))
        row = self._empty("teacher", "torch", version("torch")) | dict(self._teacher) | generation
        student = self._evaluations["student"]
        if student is not None:
            row["cloze"] = self._cloze(student.against["teacher"].right_N, student)
        return row

    def student(self) -> dict[str, Any]:
        """The student in torch, unquantized."""
        evaluation = self._evaluations["student"]
        assert evaluation is not None, "the stage ends the run when it fails"
        return self._empty("student", "torch", version("torch")) | self._fidelity("student", evaluation)

    def artifact(self, name: str) -> dict[str, Any]:
        """A file in its runtime; if the runtime died, the row says how and has no figures."""
        crash = self._records[f"validate_{name}"].crash
        measurement: dict[str, Any] = {"error": crash} if crash else self._measurement(name)
        evaluation = self._evaluations[name]
        row = self._empty(name, _RUNTIMES[name], measurement.get("runtime_version"))
        if measurement["error"] is not None or evaluation is None:
            return row | {"error": measurement["error"]}
        other = _generation(measurement["generation"]) | {
            "kld_vs_other_runtime": _mean_kld(evaluation, "gguf"),
            "quantized_cache": measurement["quantized_cache"],
            "floor": floors_of(name, evaluation, self._plan, self._work, self._records),
        }
        fidelity = self._fidelity(name, evaluation)
        fidelity["routing"] |= {"router_alone": measurement["router_alone"]}
        return row | fidelity | dict(measurement["cost"]) | other

    def load(self) -> dict[str, Any]:
        """The share of the held-out tokens that each expert gets, by model; a dense student has no experts."""
        sizes = {"teacher": [layer.n_experts for layer in self._plan.teacher_spec.layers]}
        routings: dict[str, RoutingRecord | None] = {"teacher": self._teacher_routing}
        for name in self._evaluations:
            sizes[name] = [len(layer.groups) for layer in self._experts.layers]
            routings[name] = self._routing_of(name)
        return {
            name: load_figures(expert_load(routing, sizes[name]))
            for name, routing in routings.items()
            if routing is not None
        }

    def _load(self, stage: str) -> Evaluation | None:
        path = self._work.path(stage, EVALUATION)
        return Evaluation.load(path) if path.exists() else None

    def _measurement(self, name: str) -> dict[str, Any]:
        path = self._work.path(f"validate_{name}", MEASUREMENT)
        measurement: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return measurement

    def _empty(self, artifact: str, runtime: str, runtime_version: str | None) -> dict[str, Any]:
        student = self._evaluations["student"]
        row: dict[str, Any] = dict.fromkeys(_ROW_FIELDS)
        return row | {
            "artifact": artifact,
            "runtime": runtime,
            "runtime_version": runtime_version,
            "perplexity_teacher": self._teacher["perplexity"],
            "perplexity_student_torch": perplexity(student.negative_log_likelihood_N)[0] if student else None,
            "routing": {
                "vs_torch_student": None,
                "vs_other_runtime": None,
                "vs_teacher": None,
                "router_alone": None,
            },
        }

    def _fidelity(self, name: str, evaluation: Evaluation) -> dict[str, Any]:
        return fidelity_figures(evaluation, "teacher") | {
            "domains": domain_figures(evaluation, "teacher", self._domains),
            "cloze": self._cloze(evaluation.right_N, evaluation),
            "routing": self._routing(name, evaluation),
        }

    def _cloze(self, right_N: npt.NDArray[np.bool_], evaluation: Evaluation) -> dict[str, Any] | None:
        return cloze_figures(right_N, evaluation.against["teacher"].right_N, self._last_words, self._domains)

    def _routing(self, name: str, evaluation: Evaluation) -> dict[str, Any]:
        """Each comparison that can be made; a dense student has no routing to compare."""
        other = "onnx" if name == "gguf" else "gguf"
        is_file = name in _RUNTIMES
        return {
            "vs_torch_student": _agreement(self._routing_of("student"), evaluation) if is_file else None,
            "vs_other_runtime": _agreement(self._routing_of(other), evaluation)
            if is_file and same_numbers(self._plan)
            else None,
            "vs_teacher": _agreement(self._teacher_routing, evaluation, self._experts),
            "router_alone": None,
        }

    def _routing_of(self, name: str) -> RoutingRecord | None:
        evaluation = self._evaluations[name]
        return None if evaluation is None else evaluation.routing


_ROW_FIELDS = (
    "artifact",
    "runtime",
    "runtime_version",
    "tokens",
    "chunks",
    "perplexity",
    "perplexity_error",
    "perplexity_interval",
    "perplexity_teacher",
    "perplexity_student_torch",
    "perplexity_vs_teacher",
    "kld",
    "delta_p",
    "top1_agreement",
    "top1_agreement_error",
    "top1_agreement_interval",
    "domains",
    "cloze",
    "routing",
    "floor",
    "kld_vs_other_runtime",
    "quantized_cache",
    "base_rss_bytes",
    "peak_rss_bytes",
    "load_seconds",
    "prefill_tokens_per_second",
    "prefill_runs",
    "decode_tokens_per_second",
    "decode_runs",
    "buffers",
    "device_bytes",
    "repetition",
    "generation",
    "error",
)


def _generation(figures: dict[str, Any]) -> dict[str, Any]:
    """The texts' figures; the greedy rates stand under an older name too."""
    rates = {name: figures["greedy"][name] for name in ("loop_rate", "end_of_text_rate")}
    return {"generation": figures, "repetition": {"prompts": figures["prompts"], **rates}}


def _text_effort(work: WorkDirectory) -> dict[str, Any]:
    """The passes over the original that its texts took, and how often drafts were right."""
    effort: dict[str, Any] = json.loads(work.path("teacher_texts", TEXT_EFFORT).read_text(encoding="utf-8"))
    return effort | {"acceptance_rate": effort["accepted"] / effort["drafted"] if effort["drafted"] else None}


def _loops_allowed(original: Mapping[str, Any]) -> float:
    """The share of greedy texts that may loop, from the original's texts."""
    n_texts = original["prompts"]
    return largest_share_by_chance(round(original["greedy"]["loop_rate"] * n_texts), n_texts)


def _mean_kld(evaluation: Evaluation, reference: str) -> float | None:
    against = evaluation.against.get(reference)
    return None if against is None else float(np.mean(against.kl_divergence_N))


def _agreement(
    reference: RoutingRecord | None, evaluation: Evaluation, experts: ExpertMap | None = None
) -> dict[str, Any] | None:
    if reference is None or evaluation.routing is None:
        return None
    agreement = routing_agreement(reference, evaluation.routing, experts, n_chunks=evaluation.n_chunks)
    ties = find_ties(reference, evaluation.routing) if experts is None else None
    return agreement.figures() | {"ties": None if ties is None else asdict(ties)}


def _budget(plan: Plan, artifacts: Mapping[str, Artifact], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    budget = plan.recipe.budget
    return {
        "bytes": budget.bytes,
        "kind": budget.kind,
        "context": budget.context,
        "kv_type": budget.kv_type,
        "predicted": {
            name: asdict(prediction) | {"total": prediction.total} for name, prediction in plan.predictions.items()
        },
        "measured": {
            name: {
                "file": artifact.counted_bytes,
                "total": rows[name]["peak_rss_bytes"],
                "buffers": rows[name]["buffers"],
            }
            for name, artifact in artifacts.items()
        },
    }


def _checks(plan: Plan, artifacts: Mapping[str, Artifact], rows: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    checks: list[Check] = []
    kind, limit = plan.recipe.budget.kind, plan.recipe.budget.bytes
    for name, artifact in artifacts.items():
        row = rows[name]
        counted = artifact.counted_bytes if kind == "file" else row["peak_rss_bytes"]
        checks.append(Check.at_most(f"{name}.budget", counted, limit))
        routing = row["routing"]["vs_torch_student"]
        change = None if row["perplexity"] is None else abs(row["perplexity"] / row["perplexity_student_torch"] - 1)
        figures = Figures(
            kld=row["kld"] and row["kld"]["mean"],
            top1=row["top1_agreement"],
            routing=routing and routing["overlap"],
            perplexity_change=change,
            loops=row["generation"] and row["generation"]["greedy"]["loop_rate"],
            loops_allowed=_loops_allowed(rows["teacher"]["generation"]),
        )
        checks += required_checks(
            name,
            band_of(expert_bits(name, plan.student_spec, plan.recipe.file(name))).fidelity,
            plan.require,
            figures,
            is_routed=plan.student_spec.written.n_experts > 0,
            is_whole=plan.student_spec == plan.teacher_spec and plan.recipe.compress.edit == "none",
        )
    return checks

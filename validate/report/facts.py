"""The parts of the report in words: names of models, the verdict, the size of a divergence, files that did not run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from validate.report import numbers

__all__ = [
    "BANDS",
    "Report",
    "artifact_name",
    "band",
    "cache_sentence",
    "check_name",
    "check_value",
    "checks",
    "deviations",
    "failed_checks",
    "failures",
    "find",
    "is_dense",
    "loss_name",
    "memory_needed",
    "model_name",
    "requirement",
    "row_name",
    "rung_outcome",
    "shipped_rows",
    "student_description",
    "validation_row",
    "verdict_sentence",
    "verdict_title",
    "what_is_left",
]

Report = Mapping[str, Any]
"""The content of report.json: plain data. Figures that were not measured are None or absent."""

_ARTIFACT_NAMES = {"teacher": "Original", "student": "Student", "gguf": "GGUF", "onnx": "ONNX"}
_RUNTIME_NAMES = {"torch": "torch", "llama.cpp": "llama.cpp", "onnxruntime": "ONNX Runtime"}
_SHIPPED = ("gguf", "onnx")

_CHECKS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "budget": ("size against the budget", numbers.size),
    "perplexity_change": ("change of perplexity from the unquantized model", numbers.percent),
    "routing": ("routing overlap with the unquantized model", numbers.percent),
    "kld": ("mean divergence from the original", numbers.divergence),
    "top1": ("same top token as the original", numbers.percent),
    "loops": ("greedy texts that loop", numbers.percent),
    "perplexity_as_reported": ("change of perplexity since the report", numbers.percent),
    "routing_as_reported": ("change of routing overlap since the report", numbers.percent),
    "damaged_weights": ("tensors, experts or rows that are not the original's", numbers.plain),
    "coarse_weights": ("tensors much coarser than the rest", numbers.plain),
    "finite": ("scored tokens with a finite probability", numbers.percent),
    "tokenizer": ("ways in which its tokenizer is not the original's", numbers.plain),
    "settings": ("settings that are not the original's", numbers.plain),
}
_LOSSES = {
    "kd": "distillation",
    "next-token": "next-token loss",
    "router-logits": "router logits matched",
    "ka": "distillation from augmented experts",
    "sar": "distillation from a student-aware router",
}

BANDS = ((0.0, 0.005, "like 6-bit"), (0.01, 0.05, "like 4-bit"), (0.1, math.inf, "visibly different"))
"""Mean divergence (nats) of quantized files of unpruned models: from, to, a comparison.

Community figures for Qwen-class models, llama-perplexity on wikitext; no accepted band exists for pruned models.
"""


def rung_outcome(rung: Mapping[str, Any]) -> str:
    """The outcome of a rung of recovery: kept, rejected (or its training failed), or refused."""
    if rung.get("accepted"):
        return "accepted"
    return "refused" if rung.get("selection_kld_before") is None else "rejected"


def loss_name(loss: str) -> str:
    """Returns the name of a loss in words: ``kd`` -> ``distillation``."""
    return _LOSSES.get(loss, loss)


def find(data: Any, *keys: str) -> Any:
    """The value below nested keys, or None as soon as a key is absent or null."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def artifact_name(artifact: str) -> str:
    """Returns the name of an artifact: ``gguf`` -> ``GGUF``."""
    return _ARTIFACT_NAMES.get(artifact, artifact)


def row_name(row: Mapping[str, Any]) -> str:
    """Returns the name of a row, such as ``GGUF in llama.cpp``."""
    return f"{artifact_name(row['artifact'])} in {_RUNTIME_NAMES.get(row['runtime'], row['runtime'])}"


def deviations(report: Report) -> list[str]:
    """Sentences that say where a file differs from the original because its container cannot do better."""
    return [f"{artifact_name(entry['artifact'])}: {entry['what']}" for entry in report.get("deviations") or []]


def model_name(report: Report) -> str:
    """The source model without its folder or owner."""
    return str(report["source"]["model"]).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def shipped_rows(report: Report) -> list[Mapping[str, Any]]:
    """The validation rows of files that were written, crashed ones included."""
    return [row for row in report.get("validation") or [] if row["artifact"] in _SHIPPED]


def validation_row(report: Report, artifact: str) -> Mapping[str, Any]:
    """The first validation row of a model; empty if it was not validated."""
    rows = (row for row in report.get("validation") or [] if row["artifact"] == artifact)
    return next(rows, {})


def band(mean_divergence: float) -> str:
    """Describes a mean divergence by comparison with known figures."""
    if mean_divergence < 0.005:
        return "about as close as 6-bit quantization"
    if mean_divergence < 0.01:
        return "between 6-bit and 4-bit quantization"
    if mean_divergence <= 0.05:
        return "in the range of 4-bit quantization"
    if mean_divergence <= 0.1:
        return "more than 4-bit quantization usually costs"
    return "large enough that outputs visibly differ"


def memory_needed(report: Report, artifact: str) -> tuple[int | None, bool]:
    """Bytes to compare with the budget, and whether they were measured; a total falls back on the prediction."""
    part = "file" if find(report, "budget", "kind") == "file" else "total"
    measured = find(report, "budget", "measured", artifact, part)
    if measured is not None:
        return int(measured), True
    predicted = find(report, "budget", "predicted", artifact, part)
    return (None if predicted is None else int(predicted)), False


def student_description(report: Report) -> str:
    """Describes the student: ``24 of 32 experts per layer in Q4_K``."""
    types = list(dict.fromkeys(artifact["type"] for artifact in report.get("artifacts") or []))
    return f"{what_is_left(report)} in {' and '.join(types)}" if types else what_is_left(report)


def is_dense(report: Report) -> bool:
    """True if the student is a dense model: it has no experts to choose from, so routing is left out."""
    return bool(find(report, "student", "dense"))


def what_is_left(report: Report) -> str:
    """The layers and experts that are left: ``5 of 6 layers, 24 of 32 experts per layer``."""
    source, student = report["source"], report["student"]
    n_teacher, n_student = source["n_experts"], student["n_experts"]
    parts = []
    n_dropped = source["n_layers"] - student["n_layers"]
    n_emptied = 0  # layers that are left, but have lost their experts
    if not is_dense(report):
        n_emptied = source.get("n_moe_layers", source["n_layers"]) - student["n_moe_layers"] - n_dropped
    if n_dropped or n_emptied:
        parts.append(f"{student['n_layers']} of {source['n_layers']} layers")
    if is_dense(report):
        made_of = f"from {max(len(layer) for layer in student['kept'] if layer)} of {n_teacher} experts"
        return ", ".join((*parts, f"one dense feed-forward per layer ({student['expert_width']} wide, {made_of})"))
    if n_emptied:
        parts.append(f"experts in {student['n_moe_layers']} of them")
    if student["fewest_experts"] < n_student:
        parts.append(f"{student['fewest_experts']} to {n_student} of {n_teacher} experts per layer")
    elif n_student == n_teacher:
        parts.append(f"all {n_teacher} experts")
    elif student["merged"]:
        parts.append(f"{n_teacher} experts per layer merged into {n_student}")
    else:
        parts.append(f"{n_student} of {n_teacher} experts per layer")
    parts += _rewritten_experts(report)
    if student["expert_width"] < source["expert_width"]:
        parts.append(f"experts {student['expert_width']} of {source['expert_width']} wide")
    return ", ".join(parts)


def _rewritten_experts(report: Report) -> list[str]:
    """Says which experts have other values than the original's: those on shared bases, apart or whole, or all."""
    if layers := _shared_bases(report):
        n_replaced = sum(base is not None for layer in layers for base in layer["base_of"])
        return [f"{n_replaced} of them on {sum(layer['bases'] for layer in layers)} shared bases"]
    compress = find(report, "recipe", "compress") or {}
    if compress.get("replaced"):
        n_replaced, n_bases = (
            sum(value) if isinstance(value, list | tuple) else value
            for value in (compress["replaced"], compress["bases"])
        )
        return [f"{n_replaced} of them written whole from {n_bases} shared bases and adapters"]
    return [f"rewritten by {compress['edit']}"] if compress.get("edit", "none") != "none" else []


def _shared_bases(report: Report) -> list[Mapping[str, Any]]:
    """The bases of each layer in which experts stand on some."""
    layers = find(report, "student", "expert_map", "layers") or []
    return [layer["shared"] for layer in layers if layer.get("shared")]


def checks(report: Report) -> list[Mapping[str, Any]]:
    """All checks, failures first."""
    return sorted(find(report, "verdict", "checks") or [], key=lambda check: bool(check["passed"]))


def failed_checks(report: Report) -> list[Mapping[str, Any]]:
    """The checks that failed."""
    return [check for check in checks(report) if not check["passed"]]


def failures(report: Report) -> list[str]:
    """Each failed check in one line: ``GGUF: mean divergence from the original: 0.3000 (at most 0.2000)``."""
    return [f"{check_name(check)}: {check_value(check)} ({requirement(check)})" for check in failed_checks(report)]


def check_name(check: Mapping[str, Any]) -> str:
    """Returns a check's name in words, such as ``gguf.kld``; an unknown name stays as it is."""
    artifact, _, what = str(check["name"]).partition(".")
    if artifact not in _SHIPPED or what not in _CHECKS:
        return str(check["name"])
    return f"{artifact_name(artifact)}: {_CHECKS[what][0]}"


def check_value(check: Mapping[str, Any]) -> str:
    """The value that a check measured, formatted."""
    return "not measured" if _unmeasured(check["value"]) else _check_format(check)(check["value"])


def requirement(check: Mapping[str, Any]) -> str:
    """Returns the threshold, such as ``at most 0.05``. Value and outcome give the direction, if anything does."""
    value, threshold, text = check["value"], check["threshold"], _check_format(check)(check["threshold"])
    if _unmeasured(value) or value == threshold:
        return f"threshold {text}"
    return f"at most {text}" if (value < threshold) == bool(check["passed"]) else f"at least {text}"


def verdict_title(report: Report) -> str:
    """Returns ``Passed all 9 checks`` or ``Failed 2 of 9 checks``."""
    n_checks, n_failed = len(checks(report)), len(failed_checks(report))
    plural = "check" if n_checks == 1 else "checks"
    if n_failed:
        return f"Failed {n_failed} of {n_checks} {plural}"
    if not find(report, "verdict", "passed"):
        return "Failed"
    if not n_checks:
        return "Built; nothing was checked"
    return "Passed its only check" if n_checks == 1 else f"Passed all {n_checks} checks"


def verdict_sentence(report: Report) -> str:
    """Returns one sentence: the result, whether it fits, and its distance from the original; the worst file counts."""
    sentence = f"{model_name(report)} with {student_description(report)}{_against_budget(report)}"
    measured = [row for row in shipped_rows(report) if find(row, "kld", "mean") is not None]
    if measured:
        worst = max(measured, key=lambda row: float(row["kld"]["mean"]))
        before, after = worst.get("perplexity_teacher"), worst.get("perplexity")
        sentence += (
            f"; on held-out text perplexity goes from {numbers.perplexity(before)} to {numbers.perplexity(after)} and "
            f"the mean divergence from the original is {numbers.divergence(worst['kld']['mean'])} nats, "
            f"{band(worst['kld']['mean'])}"
        )
    for row in shipped_rows(report):
        if (cache := row.get("quantized_cache")) is not None:
            sentence += f"; {cache_sentence(row, cache)}"
    crashed = [row_name(row) for row in shipped_rows(report) if row.get("error")]
    if crashed:
        sentence += f"; {' and '.join(crashed)} did not run"
    return f"{sentence}."


def cache_sentence(row: Mapping[str, Any], cache: Mapping[str, Any]) -> str:
    """Says how much a quantized cache adds; no other figure includes it."""
    return (
        f"{row_name(row)} was compared with an f16 cache; with its {cache['kv_type']} cache perplexity is "
        f"{numbers.perplexity(cache['perplexity'])}, mean divergence {numbers.divergence(cache['kld']['mean'])} nats "
        f"and same top token {numbers.percent(cache['top1_agreement'])}"
    )


def _check_format(check: Mapping[str, Any]) -> Callable[[Any], str]:
    what = str(check["name"]).partition(".")[2]
    return _CHECKS[what][1] if what in _CHECKS else numbers.plain


def _unmeasured(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _against_budget(report: Report) -> str:
    budget = find(report, "budget", "bytes")
    needs = [memory_needed(report, artifact["format"])[0] for artifact in report.get("artifacts") or []]
    known = [need for need in needs if need is not None]
    if budget is None or not known:
        return ""
    verb = "takes" if find(report, "budget", "kind") == "file" else "needs"
    relation = "within" if max(known) <= budget else "which is over"
    return f" {verb} {numbers.size(max(known))}, {relation} the budget of {numbers.size(budget)}"

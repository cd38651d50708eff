"""``README.md`` of the output folder: the model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from validate.report import facts, numbers, run, use
from validate.report.domains import domain_rows
from validate.report.facts import Report, find
from validate.report.floors import FLOOR_SENTENCE, floor_rows

__all__ = ["render_model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def render_model_card(report: Report) -> str:
    """Renders the content of report.json as a Hugging Face model card.

    Order: front matter, engines, table of files, how they were made, how to run them, limits.

    Args:
        report: the content of report.json.

    Returns:
        Markdown. Equal reports give equal text.
    """
    import jinja2  # a twentieth of a second, which plans do not need

    environment = jinja2.Environment(  # markdown, not HTML: nothing to escape but the separators of tables
        loader=jinja2.PackageLoader("validate.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        front_matter=_yaml(_front_matter(report)),
        name=facts.model_name(report),
        sentence=facts.verdict_sentence(report),
        verdict=facts.verdict_title(report),
        engines=_engines(report),
        files=_files(report),
        types=_types(report),
        rows=_measurements(report),
        floors=floor_rows(report),
        floor_sentence=FLOOR_SENTENCE,
        domains=domain_rows(report),
        has_intervals=any(row.get("perplexity_interval") for row in report["validation"]),
        source=report["source"],
        student=report["student"],
        is_dense=facts.is_dense(report),
        what_is_left=facts.what_is_left(report),
        tool=report["tool"],
        command=report.get("command"),
        recipe=_yaml(dict(report.get("recipe") or {})),
        recovery=report.get("recovery") or [],
        text=report.get("text") or {},
        runs=_runs(report),
        worth=use.sentences(report),
        limits=_limits(report),
        projector=_projector(report),
        loss_name=facts.loss_name,
        rung_outcome=facts.rung_outcome,
        numbers=numbers,
    )


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


def _front_matter(report: Report) -> dict[str, Any]:
    source, formats = report["source"], [artifact["format"] for artifact in report["artifacts"]]
    data: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link"):
        if source.get(key):
            data[key] = source[key]
    # The hub resolves base_model to a page: a local folder has none, but may name the models that it is from.
    ancestors = [name for name in (source["model"], *source.get("base_models", ())) if _HUB_ID.fullmatch(str(name))]
    if ancestors:
        data |= {"base_model": ancestors[0], "base_model_relation": "quantized"}
    if formats:
        data["library_name"] = "gguf" if "gguf" in formats else "onnxruntime"
    data["pipeline_tag"] = "text-generation"
    pruned = report["student"]["parameters"] < source["parameters"]
    kind = ["dense"] if facts.is_dense(report) else ["moe", "mixture-of-experts"]
    data["tags"] = [*formats, *kind, source["family"], "quantized", *["pruned"] * pruned]
    return data


def _engines(report: Report) -> list[str]:
    """The runtimes that the files were measured in, with versions and outcome."""
    return [
        f"{facts.row_name(row)} {row.get('runtime_version') or ''}".rstrip()
        + (": did not run" if row.get("error") else "")
        for row in facts.shipped_rows(report)
    ]


def _files(report: Report) -> list[tuple[str, ...]]:
    """Path, type, exact bytes, size, bits per weight, perplexity, divergence of every artifact."""
    rows: list[tuple[str, ...]] = []
    for artifact in report["artifacts"]:
        measured = facts.validation_row(report, artifact["format"])
        kld = measured.get("kld") or {}
        rows.append(
            (
                f"`{artifact['path']}`",
                str(artifact["type"]),
                numbers.count(artifact["bytes"]),
                numbers.size(artifact["bytes"]),
                f"{artifact['bits_per_weight']:.2f}",
                numbers.perplexity(measured.get("perplexity"), measured.get("perplexity_error")),
                numbers.change(measured.get("perplexity_teacher"), measured.get("perplexity")),
                _with_interval(numbers.divergence, kld.get("mean"), kld.get("mean_interval")),
            )
        )
    return rows


def _types(report: Report) -> list[tuple[str, str]]:
    """Kinds of tensors of the GGUF file, each with its types and, where there are several, their numbers."""
    kinds = next((file.get("tensor_types") for file in report["artifacts"] if file["format"] == "gguf"), None) or {}
    return [
        (kind, ", ".join(name if len(types) == 1 else f"{name} x {number}" for name, number in types.items()))
        for kind, types in kinds.items()
    ]


def _measurements(report: Report) -> list[tuple[str, ...]]:
    """Model, median and 99 % divergence, maximum, top-1; unless dense, routing against torch and the original."""
    comparisons = () if facts.is_dense(report) else ("vs_torch_student", "vs_teacher")
    return [
        (
            facts.row_name(row),
            *(numbers.divergence(find(row, "kld", key)) for key in ("median", "p99", "max")),
            _with_interval(numbers.percent, row.get("top1_agreement"), row.get("top1_agreement_interval")),
            *(
                _with_interval(
                    numbers.percent,
                    find(row, "routing", comparison, "overlap"),
                    find(row, "routing", comparison, "overlap_interval"),
                )
                for comparison in comparisons
            ),
        )
        for row in report["validation"]
        if row["artifact"] != "teacher" and not row.get("error")
    ]


def _with_interval(style: Callable[[float | None], str], value: float | None, ends: Sequence[float] | None) -> str:
    interval = numbers.interval(ends, style)
    return f"{style(value)} ({interval})" if interval else style(value)


def _runs(report: Report) -> list[tuple[str, str, str]]:
    """Heading, language and code of every example; paths are relative to the card."""
    runs = []
    for artifact in report["artifacts"]:
        path = Path(artifact["path"])
        if artifact["format"] == "gguf":
            runs.append(("llama.cpp", "shell", run.llama_cpp_command(report, path)))
            runs.append(("llama-cpp-python", "shell", run.llama_cpp_python_command(report, path)))
            runs.append(("Ollama", "shell", run.ollama_commands(report, path, n_parts=len(artifact["files"]))))
            runs.append(("LM Studio", "shell", f"lms import {shlex.quote(str(path))}"))
        else:
            folder = run.onnx_folder(path)
            runs.append(("ONNX Runtime", "python", run.onnxruntime_example(report, folder)))
            runs.append(("onnxruntime-genai", "python", run.genai_example(folder)))
            if not find(report, "source", "n_recurrent_layers"):  # its caches are keys and values alone
                runs.append(("optimum", "python", run.optimum_example(folder)))
    return runs


def _projector(report: Report) -> str:
    """Says which projector fits the GGUF file; empty if the original has none, or there is no such file."""
    projector = find(report, "source", "projector")
    file = next((artifact["path"] for artifact in report["artifacts"] if artifact["format"] == "gguf"), None)
    if projector is None or file is None:
        return ""
    return (
        f"The original also has {projector['part']}. Its projector (`mmproj-*.gguf`, as llama.cpp's converter makes "
        f"it) still fits the GGUF file, because embeddings are {projector['width']:,} wide as before: "
        f"`llama-server -m {shlex.quote(str(file))} --mmproj FILE`. "
        "It is no part of this release and was not measured. An ONNX folder reads text alone."
    )


def _limits(report: Report) -> list[str]:
    """The limits of the figures, and the failures."""
    limits = [f"Failed check: {failure}" for failure in facts.failures(report)]
    limits += [f"Known difference from the original: {deviation}." for deviation in facts.deviations(report)]
    limits += _new_types(report)
    for row in facts.shipped_rows(report):
        if row.get("error"):
            limits.append(f"{facts.row_name(row)} did not run on the machine that made it: {row['error']}")
    for row in facts.shipped_rows(report):
        if find(row, "kld", "mean") is not None:
            mean = row["kld"]["mean"]
            limits.append(
                f"{facts.row_name(row)}: mean divergence {numbers.divergence(mean)} nats, {facts.band(mean)}."
            )
    if report["student"]["parameters"] < report["source"]["parameters"]:
        limits.append(
            "Parameters were removed: what only they held is gone, and it may be knowledge that neither the "
            "calibration text nor the held-out text asks for."
        )
    limits.append("Perplexity, divergence and last words measure closeness to the original on one text.")
    return limits


def _new_types(report: Report) -> list[str]:
    """A sentence for people whose llama.cpp is too old for a type of the GGUF file."""
    types = {
        name
        for file in report["artifacts"]
        for of_kind in (file.get("tensor_types") or {}).values()
        for name in of_kind
    }
    if "Q2_0" not in types:
        return []
    return [
        "Some tensors are Q2_0, a type that llama.cpp knows since 2026: older releases, and programs with one, refuse "
        "the file."
    ]

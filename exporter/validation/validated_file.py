"""One file of ``moe-export validate``: its expected properties, figures, checks, and faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from exporter.file_names import STUDENT_FOLDER
from exporter.planning.recovery import is_after_quantizing, trained_roles
from exporter.validation.references import Reference
from exporter.validation.static_checks import StaticFindings, check_description, check_weights, expected_spec
from validate.files.model_file import ModelFile, RuntimeChoice
from validate.metrics.evaluation import Evaluation, evaluate
from validate.metrics.figures import fidelity_figures
from validate.metrics.positions import ReferenceLogProbs
from validate.metrics.symptoms import divergence_symptoms, routing_symptoms
from validate.metrics.verdict import Check, Figures, band_of, required_checks
from validate.routing.agreement import LayerAgreement, RoutingAgreement, routing_agreement
from validate.runtimes.backend import Backend, RuntimeBackend
from validate.runtimes.cost import LEAST_CONTEXT
from validate.vocabulary.vocabulary import FirstTokens, FirstTokensOf, check_padding, check_same_tokens

__all__ = ["Expectation", "describe_file", "validate_file"]

_SAME_TEXT_TOLERANCE = 0.001  # relative, of perplexity on the report's own text
_SAME_ROUTING_TOLERANCE = 0.01  # of the overlap; other threads break ties differently


@dataclass(frozen=True)
class Expectation:
    """The properties that a file is expected to have."""

    experts: ExpertMap | None  # the reference's experts that it kept; None: not known
    is_whole: bool  # the original was quantized and nothing else
    original: Student | None  # the student whose weights it should hold; None: not known
    trained: frozenset[Role] = frozenset()  # roles whose weights were trained further
    spec: ModelSpec | None = None  # None: as many experts and layers as it has
    reported: Mapping[str, Any] | None = None  # our report on it
    notes: tuple[str, ...] = ()

    @classmethod
    def of_report(cls, out: Path, report: Mapping[str, Any], reference: Reference) -> Expectation:
        """The expectation for a file that one of our runs published."""
        experts, keeps_mtp = ExpertMap.from_json(report["student"]["expert_map"]), False
        if reference.source is not None:  # of which only a file with a layer for MTP has one
            keeps_mtp = experts.mtp is not None and reference.source.spec.mtp is not None
            experts = experts if keeps_mtp else replace(experts, mtp=None)
        is_edited = report["recipe"]["compress"]["edit"] != "none" or any(map(_is_changed, experts.layers))
        saved = STUDENT_FOLDER.within(out)
        if saved.is_dir() and not report["student"]["dense"]:
            original: Student | None = Student.teacher(open_source(saved, keeps_mtp=keeps_mtp))
        elif reference.source is not None and not is_edited:
            original = Student(reference.source, experts)
        else:
            original = None
        known = experts if reference.n_experts == experts.n_teacher_experts else None
        spec = None if reference.source is None else experts.spec_of(reference.source.spec)
        is_whole = _keeps_everything(experts, report["source"]) and not is_edited
        trained = frozenset() if original is None else _trained_roles(report, saved.is_dir(), original.spec)
        return cls(known, is_whole, original, trained, spec, report)

    @classmethod
    def of_file(cls, file: ModelFile, reference: Reference) -> Expectation:
        """The expectation for any other file: the reference's experts and layers, if their numbers agree."""
        facts, n_experts = file.facts, reference.n_experts
        if facts.n_experts != n_experts or facts.n_layers != reference.n_layers or n_experts is None:
            said = "; routing is not compared, and no threshold is set unless --require does"
            if n_experts is None:
                note = f"nothing is known of the original's experts{said}"
            elif facts.n_experts is None:
                note = f"it has no MoE or QMoE operators that would show its experts{said}"
            else:
                note = (
                    f"it has {facts.n_experts} experts in {facts.n_layers} layers, the original {n_experts} in "
                    f"{reference.n_layers}, and nothing says which they are{said}"
                )
            return cls(None, False, None, notes=(note,))
        if reference.source is None:
            return cls(ExpertMap.keeping(n_experts, [range(n_experts)] * (facts.n_layers or 0)), True, None)
        return cls(ExpertMap.identity(reference.source.spec), True, Student.teacher(reference.source))


def _keeps_everything(experts: ExpertMap, source: Mapping[str, Any]) -> bool:
    """True if the student has all layers of the original, and all experts where the original has some."""
    everything = tuple((expert,) for expert in range(experts.n_teacher_experts))
    with_experts = [layer for layer in experts.layers if layer.groups]
    return (
        len(experts.layers) == source["n_layers"]
        and len(with_experts) == source.get("n_moe_layers", source["n_layers"])
        and all(layer.groups == everything and layer.width is None for layer in with_experts)
    )


def _trained_roles(report: Mapping[str, Any], is_saved: bool, spec: ModelSpec) -> frozenset[Role]:
    """Roles that recovery changed; if the student is saved, only those changed after it was written."""
    scopes = [str(rung["rung"]) for rung in report["recovery"] if rung.get("accepted")]
    if is_saved:
        scopes = [scope for scope in scopes if is_after_quantizing(scope)]
    return frozenset(role for scope in scopes for role in trained_roles(scope, spec))


def _is_changed(layer: LayerMap) -> bool:
    """True if a layer's experts are not the original's: merged, of another width, or on shared bases."""
    return layer.width is not None or layer.shared is not None or any(len(group) > 1 for group in layer.groups)


def validate_file(
    file: ModelFile, reference: Reference, expectation: Expectation, how: RuntimeChoice, require: Mapping[str, float]
) -> tuple[dict[str, Any], list[Check]]:
    """Runs a file over the reference's chunks.

    Returns:
        Its row of the report, and its checks.

    Raises:
        InputError: the file cannot be run, or its vocabulary is another.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
        RuntimeCrashError: the runtime failed, or died while memory and speed were measured.
    """
    backend = file.open(how, reference.chunks_BT.shape[1])
    runtime, version = backend.runtime, backend.version
    evaluation, notes = _evaluate(file, backend, reference)
    del backend  # before it is measured, and we read its weights
    context = max(reference.chunks_BT.shape[1], LEAST_CONTEXT)
    cost = file.measure(how, reference.chunks_BT[0], context)
    agreement = _agreement(reference, evaluation, expectation)
    notes = [*expectation.notes, *notes]
    if agreement is None and expectation.experts is not None and reference.routing is not None:
        notes.append("its MoE operators do not show their routing rule: routing is not compared")
    figures = fidelity_figures(evaluation, "reference")
    finite = float(np.isfinite(evaluation.negative_log_likelihood_N).mean())
    checks = [Check.at_least(f"{file.format}.finite", finite, 1.0)]
    checks += _checks(file, figures, agreement, expectation, reference, require)
    symptoms = []
    for in_file in _inspect(file, expectation, reference):
        checks += in_file.checks
        notes += in_file.notes
        symptoms += in_file.symptoms
    if not all(check.passed for check in checks):
        symptoms += _measured_symptoms(reference, evaluation, agreement, expectation)
    band = band_of(file.facts.bits_per_weight)
    row = {
        "artifact": file.format,
        "path": str(file.path),
        "runtime": runtime,
        "runtime_version": version,
        "bits_per_weight": file.facts.bits_per_weight,
        "band": band.name,
        **figures,
        "context": context,
        **asdict(cost),
        "routing": _routing(agreement),
        "routing_overlap_vs_teacher": None if agreement is None else agreement.mean("overlap"),
        "routing_overlap_interval": None if agreement is None else agreement.overlap_interval,
        "notes": notes,
        "symptoms": symptoms,
        "error": None,
    }
    return row, checks


def _evaluate(file: ModelFile, backend: RuntimeBackend, reference: Reference) -> tuple[Evaluation, list[str]]:
    """The evaluation, over the tokens that both vocabularies have, and notes on the vocabularies."""
    model: Backend = backend
    log_probs: ReferenceLogProbs = reference.log_probs
    chunks_BT, notes = _chunks_for(backend, reference), []
    if reference.vocabulary is not None:
        own = file.vocabulary()
        if own is not None:
            check_same_tokens(own, reference.vocabulary, chunks_BT)
        sizes = backend.vocab_size, reference.log_probs.vocab_size
        n_common = min(sizes)
        if sizes[0] != sizes[1]:
            check_padding(own if sizes[0] > n_common else reference.vocabulary, n_common, max(sizes))
            model, log_probs = FirstTokens(backend, n_common), FirstTokensOf(log_probs, n_common)
            notes.append(
                f"its vocabulary has {sizes[0]:,} tokens, the original's {sizes[1]:,}: the tokens beyond {n_common:,} "
                "are padding and were left out on both sides"
            )
    return evaluate(model, chunks_BT, {"reference": log_probs}), notes


def _chunks_for(backend: RuntimeBackend, reference: Reference) -> npt.NDArray[np.int64]:
    """The chunks with BOS where llama-perplexity puts it; its file has the text's own token there."""
    chunks_BT = reference.chunks_BT
    if reference.text_sha256 is None and backend.bos_token is not None:
        chunks_BT = chunks_BT.copy()
        chunks_BT[:, 0] = backend.bos_token
    return chunks_BT


def _agreement(reference: Reference, evaluation: Evaluation, expectation: Expectation) -> RoutingAgreement | None:
    if reference.routing is None or evaluation.routing is None or expectation.experts is None:
        return None
    return routing_agreement(reference.routing, evaluation.routing, expectation.experts, n_chunks=evaluation.n_chunks)


def _inspect(file: ModelFile, expectation: Expectation, reference: Reference) -> list[StaticFindings]:
    """Compares the file itself with the original's settings, tokenizer and weights."""
    described = describe_file(file, reference, expectation)
    found = [] if described is None else [described]
    if expectation.original is not None:
        found.append(check_weights(file, expectation.original, expectation.trained))
    return found


def describe_file(file: ModelFile, reference: Reference, expectation: Expectation) -> StaticFindings | None:
    """Compares settings and tokenizer without running the file; None if the original's are not known.

    Raises:
        InputError: the file cannot be read.
    """
    source = reference.source
    if source is None:
        return None
    spec = expectation.spec or expected_spec(file, source.spec)
    return check_description(file, source, spec, reference.chunks_BT)


def _checks(
    file: ModelFile,
    figures: Mapping[str, Any],
    agreement: RoutingAgreement | None,
    expectation: Expectation,
    reference: Reference,
    require: Mapping[str, float],
) -> list[Check]:
    overlap = None if agreement is None else agreement.mean("overlap")
    judged = Figures(
        kld=figures["kld"]["mean"],
        top1=figures["top1_agreement"],
        routing=overlap,
        perplexity_change=abs(figures["perplexity_vs_teacher"]["ratio"] - 1),
    )
    checks = required_checks(
        file.format,
        band_of(file.facts.bits_per_weight).fidelity if expectation.is_whole else None,
        require,
        judged,
        is_routed=agreement is not None or "routing" in require,
        is_whole=expectation.is_whole,
    )
    report = expectation.reported
    if report is None or reference.text_sha256 != report["text"]["heldout"]["sha256"]:
        return checks
    (entry,) = (row for row in report["validation"] if row["artifact"] == file.format)
    reported, routing = entry["perplexity"], (entry["routing"] or {}).get("vs_teacher")
    change = None if reported is None else abs(figures["perplexity"] / reported - 1)
    checks.append(Check.at_most(f"{file.format}.perplexity_as_reported", change, _SAME_TEXT_TOLERANCE))
    if reference.source is not None and routing is not None and overlap is not None:
        change = abs(overlap - routing["overlap"])
        checks.append(Check.at_most(f"{file.format}.routing_as_reported", change, _SAME_ROUTING_TOLERANCE))
    return checks


def _measured_symptoms(
    reference: Reference, evaluation: Evaluation, agreement: RoutingAgreement | None, expectation: Expectation
) -> list[str]:
    """The symptoms in divergence and routing; none unless the original was quantized and nothing else."""
    original, found = reference.routing, evaluation.routing
    if original is None or not expectation.is_whole:
        return []
    divergence_N = evaluation.against["reference"].kl_divergence_N
    symptoms = divergence_symptoms(divergence_N, evaluation.n_chunks, reference.chunks_BT.shape[1], original)
    if agreement is not None and found is not None:
        symptoms = routing_symptoms(agreement, original, found) + symptoms
    return symptoms


def _routing(agreement: RoutingAgreement | None) -> dict[str, Any] | None:
    """The fields of routing, as in a row of an export's report."""
    if agreement is None:
        return None
    overall: dict[str, Any] = {figure.name: agreement.mean(figure.name) for figure in fields(LayerAgreement)}
    overall["overlap_interval"] = agreement.overlap_interval
    return overall | {"per_layer": [None if layer is None else asdict(layer) for layer in agreement.layers]}

"""Compares a file with the original before it runs: its settings, its tokenizer and its weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec, MoeSize
from compressors.model.description.tensors import Kind
from compressors.model.errors import InputError, MoeExportError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.gguf_settings import gguf_setting_symptoms
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.writing.gguf.container import render_header, render_values
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from validate.files.folder_settings import folder_setting_symptoms
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.model_file import ModelFile
from validate.files.rope_factors import rope_factor_symptoms
from validate.files.weight_comparison import Fault, compare_weights
from validate.files.weight_symptoms import coarse_symptoms, weight_symptoms
from validate.metrics.symptoms import setting_symptoms
from validate.metrics.verdict import Check
from validate.vocabulary.original_tokenizer import original_tokenizer
from validate.vocabulary.tokenization import Encode
from validate.vocabulary.tokenizer_check import TokenizerFindings, check_folder_tokenizer, check_gguf_tokenizer
from validate.vocabulary.vocabulary import GgufVocabulary

__all__ = ["StaticFindings", "check_description", "check_weights", "expected_spec"]


@dataclass(frozen=True)
class StaticFindings:
    """The checks, a symptom for each fault, and notes on parts that could not be compared."""

    checks: list[Check] = field(default_factory=list)
    symptoms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, symptoms: Sequence[str], count: int | None = None) -> None:
        """Adds a check that passes if there are no symptoms."""
        self.checks.append(Check.at_most(name, len(symptoms) if count is None else count, 0))
        self.symptoms.extend(symptoms)


def expected_spec(file: ModelFile, source: ModelSpec) -> ModelSpec | None:
    """Returns the model that a file should hold: the original, with as many experts and layers as the file has.

    Returns:
        None if the file has no experts, because the right width of its feed-forward is not known.

    Raises:
        InputError: the file cannot be read.
    """
    facts = file.facts
    n_layers, n_experts = facts.n_layers, facts.n_experts
    gguf = GgufFile(file.path) if file.format == "gguf" else None
    if gguf is not None and "split.count" not in gguf.metadata:  # by its tensors: its metadata may be wrong
        layers = [int(name.split(".")[1]) for name in gguf.tensors if re.match(r"blk\.\d+\.", name)]
        n_layers = max(layers, default=-1) + 1 - facts.n_mtp
        n_experts = max((_experts_in(gguf, source, layer) for layer in range(n_layers)), default=0)
    if not n_experts or not n_layers:
        return None
    if (n_experts, n_layers) == (source.n_experts, source.n_layers):
        return source
    like = [min(layer, source.n_layers - 1) for layer in range(n_layers)]  # the file may have more layers
    size = MoeSize(n_experts, source.expert_width)
    return source.with_sizes([size] * n_layers, like, size)


def _experts_in(gguf: GgufFile, source: ModelSpec, layer: int) -> int:
    """The number of experts in a layer of a file, by the shape of a tensor that holds them all; 0 if it has none."""
    names = {each.gguf.name for described in source.layers for each in described.expert_tensors}
    found = [gguf.tensors.get(name.format(layer=layer)) for name in sorted(names)]
    return max((entry.shape[0] for entry in found if entry is not None and len(entry.shape) == 3), default=0)


def check_description(
    file: ModelFile, source: Source, spec: ModelSpec | None, chunks_BT: npt.NDArray[np.int64]
) -> StaticFindings:
    """Compares a file's settings and its tokenizer with the original's.

    Args:
        file: the file.
        source: the original.
        spec: the model that the file should hold; with None its settings are not compared.
        chunks_BT: tokens of held-out text.

    Raises:
        InputError: the file cannot be read.
    """
    findings = StaticFindings()
    settings: list[str] = []
    if spec is None:
        findings.notes.append("its settings were not compared with the original's: it has no experts")
    else:
        vocab_size = file.facts.vocab_size or spec.vocab_size
        settings += _setting_symptoms(file, source, replace(spec, vocab_size=vocab_size))
    tokenizer = _tokenizer_findings(file, source, chunks_BT)
    if tokenizer is None:
        findings.notes.append("it has no tokenizer: the original's was used")
    else:
        settings += tokenizer.settings
        findings.notes.extend(tokenizer.notes)
    findings.add(f"{file.format}.settings", settings)
    if tokenizer is not None:
        findings.add(f"{file.format}.tokenizer", tokenizer.symptoms)
    return findings


def _setting_symptoms(file: ModelFile, source: Source, spec: ModelSpec) -> list[str]:
    if file.format == "gguf":
        gguf = GgufFile(file.path)
        return [*gguf_setting_symptoms(gguf.metadata, spec), *rope_factor_symptoms(gguf, spec)]
    return [
        *setting_symptoms(file.facts, spec),
        *graph_setting_symptoms(file.path, spec),
        *folder_setting_symptoms(file.path, source, spec),
    ]


def _tokenizer_findings(file: ModelFile, source: Source, chunks_BT: npt.NDArray[np.int64]) -> TokenizerFindings | None:
    """Compares the tokenizer; None for a graph that has none."""
    original, chunks = original_tokenizer(source.tokenizer_folder, source.spec.vocab_size), chunks_BT.tolist()
    if file.format == "gguf":
        metadata = GgufFile(file.path).metadata
        return check_gguf_tokenizer(file.path, metadata, original, chunks, lambda: _best_vocabulary(source))
    folder = file.tokenizer_folder
    return None if folder is None else check_folder_tokenizer(folder, original, chunks)


def _best_vocabulary(source: Source) -> Encode | None:
    """Cuts text in llama.cpp with the vocabulary that we would write; None if we would write none."""
    spec = source.spec
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        try:
            values = model_metadata(spec, source, "vocabulary", "F32")
            values |= vocabulary_metadata(source.tokenizer_folder, spec.vocab_size)
            path.write_bytes(render_header(len(values), render_values(values), []))
            vocabulary = GgufVocabulary(path)
        except MoeExportError:
            return None
    return lambda text: vocabulary.encode(text, add_special_tokens=False, parse_special=True)


def check_weights(file: ModelFile, original: Student, trained: frozenset[Role] = frozenset()) -> StaticFindings:
    """Compares a file's weights with those that it should hold.

    Args:
        file: the file.
        original: the student with these weights.
        trained: roles whose weights recovery trained further, so that they need not be equal.

    Raises:
        InputError: the file or the student cannot be read.
    """
    findings = StaticFindings()
    n_tokens = file.facts.vocab_size
    spec = original.spec if n_tokens is None else replace(original.spec, vocab_size=n_tokens)
    try:
        weights = file.weights(spec)
    except InputError as error:
        findings.notes.append(f"weights were not compared with the original's ({error})")
        return findings
    comparison = compare_weights(
        original,
        original.as_written(weights),
        weights.stored_type,
        n_tokens=min(spec.vocab_size, original.spec.vocab_size),
    )
    # training changed these tensors in an unknown way: only certain faults count
    certain = (Fault.ZERO, Fault.HOLDS_ANOTHER)
    damage = [
        entry
        for entry in comparison.damage
        if entry.unit.role not in trained or (entry.fault in certain and entry.unit.row is None)
    ]
    if trained <= {tensor.role for tensor, _ in original.spec.places if tensor.kind is Kind.ROUTER}:
        findings.add(f"{file.format}.coarse_weights", coarse_symptoms(comparison))
    text = None
    if any(entry.unit.row is not None for entry in damage):
        text = original_tokenizer(original.source.tokenizer_folder, original.spec.vocab_size).text
    findings.add(f"{file.format}.damaged_weights", weight_symptoms(damage, text), len(damage))
    return findings

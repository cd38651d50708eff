"""Measures files of every size in llama.cpp: llama-quantize's mixes, pruned models, and the search's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import UnsupportedError
from exporter.curve.rows import OURS, ParetoRow, RowFile
from exporter.file_names import HELDOUT_PREDICTIONS, ROWS
from exporter.searching.curve import ParetoFiles, described_structure
from exporter.stages.inputs import teacher_predictions, token_blocks, use_threads
from exporter.work.stage import StageContext
from exporter.writing.gguf.file_size import predict_file_size
from validate.metrics.evaluation import evaluate
from validate.metrics.figures import fidelity_figures
from validate.runtimes.llama_cpp import LlamaCppBackend

__all__ = ["MIXES", "MIXES_OF_PRUNED", "WHOLE", "pareto", "pruned_method"]

WHOLE = "all experts"
"""The method of a mix of the whole model."""

MIXES = (
    *("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
)
MIXES_OF_PRUNED = ("Q6_K", "Q4_K_M", "Q2_K", "IQ2_XXS")
_PRUNED = (0.25, 0.5)  # shares of the experts that are removed


def pareto(context: StageContext) -> None:
    """Writes a row for each file; a resumed attempt keeps the rows that are there."""
    use_threads(context.plan)
    curve = _Curve(context)
    curve.measure_mixes(WHOLE, MIXES)
    n_experts = context.plan.teacher_spec.n_experts
    for share in _PRUNED:
        kept = round((1 - share) * n_experts)
        if kept >= context.plan.teacher_spec.top_k:
            curve.measure_mixes(pruned_method(share), MIXES_OF_PRUNED, kept)
    for label, n_bytes in context.plan.curve.items():
        curve.measure_ours(label, n_bytes)


def pruned_method(share: float) -> str:
    """The method in the rows of a model without this share of its experts."""
    return f"REAP {share:.0%}"


class _Curve:
    def __init__(self, context: StageContext) -> None:
        plan = context.plan
        self._context = context
        self._files = ParetoFiles(context)
        self._rows = RowFile(context.file(ROWS))
        self._model = plan.recipe.source.model
        source = plan.open_source()
        self._bf16_bytes = predict_file_size(source.spec, source, "BF16", self._model)
        self._heldout_BT = token_blocks(context.work).heldout.numpy()

    def measure_mixes(self, method: str, mixes: tuple[str, ...], n_experts: int | None = None) -> None:
        """Measures llama-quantize's mixes; one that cannot hold the model is left out."""
        structure = "" if n_experts is None else f"{n_experts} experts"
        for mix in mixes:
            if self._rows.find(self._model, method, mix) is None:
                try:
                    path = self._files.write_mix(mix, n_experts)
                except UnsupportedError:
                    continue
                self._measure(path, method, mix, structure)

    def measure_ours(self, label: str, n_bytes: int) -> None:
        """Measures the best file of at most ``n_bytes`` bytes."""
        if self._rows.find(self._model, OURS, label) is None:
            found = self._files.best(n_bytes)
            structure = described_structure(found.compress, self._context.plan.teacher_spec)
            self._measure(self._files.write(found), OURS, label, structure, found.predicted, n_bytes)

    def _measure(
        self,
        path: Path,
        method: str,
        mix: str,
        structure: str,
        predicted: float | None = None,
        budget: int | None = None,
    ) -> None:
        figures = self._figures(path, f"{method}, {mix}: chunks")
        kld, n_bytes = figures["kld"], path.stat().st_size
        self._rows.add(
            ParetoRow(
                model=self._model,
                method=method,
                mix=mix,
                n_bytes=n_bytes,
                share=n_bytes / self._bf16_bytes,
                divergence=kld["mean"],
                divergence_error=kld["mean_error"],
                top1=figures["top1_agreement"],
                perplexity=figures["perplexity"],
                structure=structure,
                predicted=predicted,
                budget=budget,
            )
        )
        path.unlink()

    def _figures(self, path: Path, what: str) -> Mapping[str, Any]:
        """The figures of llama.cpp on the held-out text, against the original in torch."""
        backend = LlamaCppBackend(path, threads=self._context.plan.recipe.threads)
        original = teacher_predictions(self._context.plan, self._context.work, HELDOUT_PREDICTIONS)
        with self._context.progress.bar(what, len(self._heldout_BT)) as advance:
            evaluation = evaluate(backend, self._heldout_BT, {"teacher": original}, progress=advance)
        return fidelity_figures(evaluation, "teacher")

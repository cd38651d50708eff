"""The files of a curve of divergence against bytes: the best of each size that the search finds, and the baselines.

All sizes share the search's measurements of a structure: its sensitivities, and the errors of its types.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from compressors.model.description.spec import ModelSpec
from exporter.file_names import BUILD
from exporter.planning.compression import described_compression
from exporter.planning.recipe import CompressChoice, FileChoice, RecoverChoice
from exporter.searching.ladder import ladder_for, rung_beside_codes
from exporter.searching.search import Candidate, Search
from exporter.searching.structures import whole, with_experts
from exporter.stages.inputs import artifact_path
from exporter.stages.table import COMPRESS, GGUF, OF_THE_RUN, ONNX, RECOVER, RETUNE, SCHEDULING
from exporter.work.stage import StageContext

__all__ = ["ParetoFiles", "described_structure"]

_WRITERS = {"gguf": GGUF, "onnx": ONNX}


class ParetoFiles:
    """Makes files, one at a time: each replaces the one before.

    Args:
        context: context of a stage after calibration and sensitivities, whose plan leaves the recipe to a search; the
            search's measurements are kept in its folder, so that a resumed attempt does not repeat them.
    """

    def __init__(self, context: StageContext) -> None:
        assert context.plan.search is not None, "the recipe stands"
        self._context = context
        self._spec = context.plan.open_source().spec

    def best(self, n_bytes: int, artifact: str = "gguf") -> Candidate:
        """The GGUF file, or ONNX folder, that the search expects to be the best among those that are no larger.

        Raises:
            BudgetError: no file is that small; the message names the smallest size.
        """
        plan = self._context.plan
        budget = plan.recipe.budget.model_copy(update={"bytes": n_bytes, "kind": "file"})
        recipe = plan.recipe.model_copy(update={"budget": budget})
        return Search(replace(self._context, plan=replace(plan, recipe=recipe)), n_measured=0).best(artifact)

    def write(self, candidate: Candidate) -> Path:
        """Writes a candidate of the search, as an export would."""
        plan = self._context.plan
        ladder, _ = ladder_for(candidate.compress, plan)
        files = {"gguf": None, "onnx": None, candidate.artifact: candidate.choice}
        recipe = plan.recipe.model_copy(update={"compress": candidate.compress, **files})
        beside = rung_beside_codes(recipe, plan, candidate.expected)
        ladder = ladder.model_copy(update={"after_quantizing": beside})
        return self._built(candidate.compress, ladder, candidate.choice, candidate.artifact)

    def write_mix(self, mix: str, n_experts: int | None = None, recovery: str = "none", artifact: str = "gguf") -> Path:
        """Writes one of llama-quantize's mixes, or a preset of the ONNX writer, with the kernels' codes.

        Args:
            mix: its name.
            n_experts: experts of each layer that REAP keeps; None: all.
            recovery: one of :data:`exporter.planning.recovery.RECOVERIES`.
            artifact: gguf or onnx.

        Raises:
            UnsupportedError: the mix or the artifact cannot hold this model.
        """
        choice = whole(self._spec) if n_experts is None else with_experts("reap", n_experts, self._spec)
        plan = self._context.plan
        assert plan.search is not None, "the recipe stands"
        ladder, _ = ladder_for(choice, replace(plan, search=replace(plan.search, recover=recovery)))
        return self._built(choice, ladder, FileChoice(mix=mix, quantizer="kernel"), artifact)

    def _built(self, structure: CompressChoice, ladder: RecoverChoice, file: FileChoice, artifact: str) -> Path:
        """Runs the stages of an export in this process; returns the file or folder."""
        plan, folder = self._context.plan, self._context.file(BUILD)
        shutil.rmtree(folder, ignore_errors=True)
        files = {name: file if name == artifact else None for name in _WRITERS}
        recipe = plan.recipe.model_copy(update={"compress": structure, "recover": ladder, **files})
        plan, work = replace(plan, recipe=recipe, search=None), self._context.work.within(folder, OF_THE_RUN)
        stages = [COMPRESS, SCHEDULING, RECOVER, _WRITERS[artifact]]
        if ladder.after_quantizing is not None:
            stages.append(RETUNE)
        for stage in stages:
            self._context.run_inside(stage, plan, work)
        return artifact_path(work, artifact)


def described_structure(choice: CompressChoice, spec: ModelSpec) -> str:
    """Describes the parts of a model that are left; empty if all are."""
    return "" if choice == whole(spec) else described_compression(choice, spec)

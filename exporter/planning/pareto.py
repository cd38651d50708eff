"""The files of a curve of divergence against bytes: of each size the best that the search finds, and the baselines.

All sizes share what was measured of a structure: its sensitivities, the errors of its types, what recovery taught it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from compressors.model.checkpoint import Checkpoint
from exporter.planning.search import Candidate, Search
from exporter.planning.structures import candidates_of, whole, with_experts
from exporter.planning.trial import Trial
from exporter.recipe import CompressChoice, FileChoice
from exporter.stage import StageContext
from exporter.stages import gguf

__all__ = ["ParetoFiles"]

_FILE = "file"
_ALL_BLOCKS = 1 << 30  # of each rung of recovery


class ParetoFiles:
    """Makes GGUF files, one at a time.

    Args:
        context: of a stage after calibration and sensitivities, whose plan leaves the recipe to a search; what is
            learned of structures is kept in its folder, so that an attempt that goes on does not learn it again.
    """

    def __init__(self, context: StageContext) -> None:
        assert context.plan.search is not None, "the recipe stands"
        self._context = context
        self._shape = Checkpoint(context.plan.source).shape

    def best(self, n_bytes: int) -> Candidate:
        """The file that the search expects most of among those that are no larger; nothing is measured for it.

        Raises:
            BudgetError: nothing is so small; the message names the smallest size.
        """
        plan = self._context.plan
        budget = plan.recipe.budget.model_copy(update={"bytes": n_bytes, "kind": "file"})
        recipe = plan.recipe.model_copy(update={"budget": budget})
        return Search(replace(self._context, plan=replace(plan, recipe=recipe)), n_measured=0).best("gguf")

    def write(self, candidate: Candidate) -> Path:
        """Writes what the search found, its student recovered in full; the next file takes its place."""
        trial = self._trial(self._context, "finished", candidate.compress)
        return self._written(trial, candidate.choice)

    def write_mix(self, mix: str, n_experts: int | None = None) -> Path:
        """Writes one of llama-quantize's mixes with the kernels' codes.

        Args:
            mix: its name.
            n_experts: so many of each layer's experts, those that REAP keeps, without recovery; None: all.

        Raises:
            UnsupportedError: it cannot hold this model.
        """
        plan = self._context.plan
        assert plan.search is not None, "the recipe stands"
        plan = replace(plan, search=replace(plan.search, recover="none"))
        choice = whole(self._shape) if n_experts is None else with_experts("reap", n_experts, self._shape)
        trial = self._trial(replace(self._context, plan=plan), "unrecovered", choice)
        return self._written(trial, FileChoice(mix=mix, quantizer="kernel"))

    def _trial(self, context: StageContext, name: str, choice: CompressChoice) -> Trial:
        """A student that is not taught for a short while only; ``name`` tells apart how it is taught."""
        folder = self._context.output / name
        structures = [whole(self._shape), *candidates_of("auto", self._shape)]
        number = structures.index(choice)
        return replace(Trial.of(replace(context, output=folder), choice, number), most_blocks=_ALL_BLOCKS)

    def _written(self, trial: Trial, choice: FileChoice) -> Path:
        folder = self._context.output / _FILE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return gguf.write(replace(trial.context, output=folder), trial.student(), choice, folder)

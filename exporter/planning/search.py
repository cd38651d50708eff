"""The search for the best file that fits a budget: structures, types, and the measurements that decide between them.

For each artifact by its container's rules: the original with types given to its tensors by their predicted effect; and,
where that does not fit or is predicted to be far from the original, smaller structures, each built, judged and taught
for a short while before its tensors get their types. The best by prediction are measured as the files that they would
be, beside the best of llama-quantize's mixes that fit; the lowest divergence on the selection split wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import BudgetError
from compressors.sensitivity import DivergenceModel, TypeTable
from exporter.planning.container import Container
from exporter.planning.fitting import Fitted
from exporter.planning.measuring import measured_divergence
from exporter.planning.outlook import (
    STRUCTURES_FROM,
    container_of,
    fitted_table,
    outlooks,
    refuse_unless_something_fits,
)
from exporter.planning.structures import structures_for, whole
from exporter.planning.trial import Trial
from exporter.planning.units import fitting_mixes, units_of
from exporter.recipe import CompressChoice, FileChoice
from exporter.stage import StageContext

__all__ = ["Candidate", "Search"]

_MOST_STRUCTURES = 3  # that are built
_CLOSE = 1.5  # a structure whose predicted divergence is so many times the best's is not measured


@dataclass(frozen=True)
class Candidate:
    """A file that was looked at."""

    artifact: str
    compress: CompressChoice
    choice: FileChoice
    n_bytes: int  # of the file
    predicted: float | None  # divergence on the selection split, nats; None: a mix, which is only measured
    measured: float | None = None  # None: it was not
    is_baseline: bool = False


@dataclass(frozen=True)
class _Option:
    """A trial with the types that fit."""

    trial: Trial
    container: Container
    table: TypeTable
    fitted: Fitted
    predicted: float

    def candidate(self, measured: float | None = None) -> Candidate:
        choice, compress = self.fitted.choice, self.trial.compress
        return Candidate(
            self.container.artifact, compress, choice, self.fitted.prediction.file, self.predicted, measured
        )


class Search:
    """Looks for the best file of each artifact of a plan.

    Args:
        context: of the stage; its plan names budget and pins.
        n_measured: files of each artifact that are written and measured, at most.
    """

    def __init__(self, context: StageContext, n_measured: int) -> None:
        assert context.plan.search is not None, "the recipe stands"
        self._context = context
        self._recipe = context.plan.recipe
        self._source = Checkpoint(context.plan.source)
        self._structures = structures_for(context.plan.search, self._source.shape)
        self._n_measured = n_measured
        self._trials: dict[CompressChoice, Trial] = {}
        self.candidates: list[Candidate] = []  # all that were looked at

    def best(self, artifact: str) -> Candidate:
        """The best file of an artifact.

        Raises:
            BudgetError: nothing fits; the message names the smallest budget that would work.
        """
        refuse_unless_something_fits(self._recipe, artifact, self._source, self._structures)
        options = self._options(artifact)
        close = [option for option in options if option.predicted <= _CLOSE * options[0].predicted]
        measured = [self._measured(option) for option in close[: max(0, self._n_measured - 2)]]
        measured += self._baselines(artifact, self._n_measured - len(measured))
        self.candidates += [option.candidate() for option in options[len(measured) :]] + measured
        return min(measured, key=_divergence) if measured else options[0].candidate()

    def remove_trials(self) -> None:
        """Removes the students that were built; their figures stay."""
        for trial in self._trials.values():
            trial.remove()

    def _options(self, artifact: str) -> list[_Option]:
        """The structures that fit with their best types, by rising predicted divergence."""
        found: list[_Option] = []
        for outlook in outlooks(self._recipe, artifact, self._source, self._structures):
            option = self._option(artifact, outlook.compress)
            if option is not None:
                found.append(option)
            is_good = any(option.predicted <= STRUCTURES_FROM for option in found)
            if is_good or len(self._trials) >= _MOST_STRUCTURES:
                break
        if not found:
            raise BudgetError(f"nothing fits the budget as {artifact} once the weights are known; give a little more")
        return sorted(found, key=lambda option: option.predicted)

    def _option(self, artifact: str, choice: CompressChoice) -> _Option | None:
        """A structure with the best types that fit; None if none do."""
        container = container_of(self._recipe, artifact, self._source, choice)
        trial = self._trial(choice)
        found = fitted_table(container, trial.table(units_of(container, self._source.dtype), artifact))
        if found is None:
            return None
        fitted, table = found
        predicted = trial.divergence() + DivergenceModel().divergence(fitted.allocation.second_order)
        return _Option(trial, container, table, fitted, predicted)

    def _trial(self, choice: CompressChoice) -> Trial:
        """The structure, built and taught for a short while if it is not the original."""
        if choice not in self._trials:
            number = 0 if choice == whole(self._source.shape) else 1 + self._structures.index(choice)
            self._trials[choice] = Trial.of(self._context, choice, number)
        return self._trials[choice]

    def _measured(self, option: _Option) -> Candidate:
        return option.candidate(measured_divergence(option.trial, option.container.artifact, option.fitted.choice))

    def _baselines(self, artifact: str, n_measured: int) -> Iterator[Candidate]:
        """The largest of the named mixes that fit, with all experts and the kernels' codes."""
        original = whole(self._source.shape)
        if original not in self._structures:
            return
        container = container_of(self._recipe, artifact, self._source, original)
        for choice, prediction in fitting_mixes(container)[: max(0, n_measured)]:
            divergence = measured_divergence(self._trial(original), artifact, choice)
            yield Candidate(artifact, original, choice, prediction.file, None, divergence, is_baseline=True)


def _divergence(candidate: Candidate) -> float:
    assert candidate.measured is not None, "only what was measured is compared"
    return candidate.measured

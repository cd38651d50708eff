"""The search for the best file that fits a budget: structures, types, and the measurements that decide between them.

For each artifact, by its container's rules, it considers the original with types given to its tensors by their
predicted effect; and, where that does not fit or is predicted to be far from the original, smaller structures, each
built, judged and trained for a short while before its tensors get their types. The best by prediction are measured as
the files that they would be, beside the best of llama-quantize's mixes that fit; the lowest divergence on the selection
split wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from compressors.model.errors import BudgetError, UnsupportedError
from compressors.model.sources.student import Student
from compressors.sensitivity import DivergenceModel, UnitPlan
from exporter.planning.recipe import CompressChoice, FileChoice
from exporter.planning.resulting_spec import layers_with_experts
from exporter.searching.fitting import Fitted
from exporter.searching.measuring import measured_divergence
from exporter.searching.outlook import (
    STRUCTURES_FROM,
    best_fit,
    outlooks,
    refuse_unless_something_fits,
    untyped_file_of,
)
from exporter.searching.speed import most_seconds
from exporter.searching.structures import MOST_STRUCTURES, structures_for, whole
from exporter.searching.trial import Trial
from exporter.searching.units import LAST_RESORT, fitting_mixes, units_of
from exporter.stages.inputs import teacher_statistics
from exporter.stages.student.layer_targets import placed_by_statistics
from exporter.work.stage import StageContext

__all__ = ["Candidate", "Search"]


@dataclass(frozen=True)
class Candidate:
    """A file that the search considered."""

    artifact: str
    compress: CompressChoice
    choice: FileChoice
    n_bytes: int  # the size of the file
    predicted: float | None  # divergence on the selection split, nats; None: a mix, which is only measured
    measured: float | None = None  # None: it was not measured
    is_baseline: bool = False

    @property
    def expected(self) -> float:
        """The divergence as measured, or else as predicted: nats."""
        return self.measured if self.measured is not None else self.predicted or 0.0


@dataclass(frozen=True)
class _Option:
    """A trial with the types that fit."""

    trial: Trial
    artifact: str
    fitted: Fitted
    predicted: float
    measured: float | None = None

    @property
    def expected(self) -> float:
        """The divergence as measured, or else as predicted: nats."""
        return self.predicted if self.measured is None else self.measured

    @property
    def candidate(self) -> Candidate:
        """The option as a candidate, for the report."""
        choice, n_bytes = self.fitted.choice, self.fitted.prediction.file
        return Candidate(self.artifact, self.trial.compress, choice, n_bytes, self.predicted, self.measured)


class Search:
    """Looks for the best file of each artifact of a plan.

    Args:
        context: context of the stage; its plan gives the budget and the choices of the command line.
        n_measured: the most files of each artifact that are written and measured.
    """

    def __init__(self, context: StageContext, n_measured: int) -> None:
        assert context.plan.search is not None, "the recipe stands"
        self._context = context
        self._wishes = context.plan.search
        self._recipe = context.plan.recipe
        self._source = context.plan.open_source()
        self._structures = self._placed(structures_for(self._wishes, self._source.spec))
        self._n_measured = n_measured
        self._trials: dict[CompressChoice, Trial] = {}
        self._model = DivergenceModel()  # calibrated for each artifact as soon as a file of the original is measured
        self.candidates: list[Candidate] = []  # all that were considered

    def best(self, artifact: str) -> Candidate:
        """The best file of an artifact.

        Raises:
            BudgetError: nothing fits; the message names the smallest budget that would work.
        """
        refuse_unless_something_fits(self._recipe, self._source, self._structures, [artifact])
        options = self._options(artifact)
        candidates = [option.candidate for option in options]
        n_left = self._n_measured - sum(option.measured is not None for option in options)
        candidates += self._baselines(artifact, n_left)
        self.candidates += candidates
        measured = [candidate for candidate in candidates if candidate.measured is not None]
        return min(measured, key=_measured_divergence) if measured else options[0].candidate

    def _placed(self, structures: Sequence[CompressChoice]) -> list[CompressChoice]:
        """Says of each layer how many experts it replaces: types differ by layer, so the file's bytes depend on it."""
        statistics = teacher_statistics(self._context.plan, self._context.work)
        of_layers = [statistics[layer] for layer in layers_with_experts(self._source.spec)]
        return [placed_by_statistics(choice, of_layers) for choice in structures]

    def remove_trials(self) -> None:
        """Removes the students that were built; their figures stay."""
        for trial in self._trials.values():
            trial.remove()

    def _options(self, artifact: str) -> list[_Option]:
        """The structures that were considered, with their best types, by rising expected divergence."""
        first, *smaller = self._structures
        self._model = DivergenceModel()
        whole_one = self._option(artifact, first)
        found = [] if whole_one is None else [whole_one]
        if self._n_measured > 1:
            found = [self._measured(option) for option in found]
            self._calibrate(found)
        if not found or found[0].expected > STRUCTURES_FROM:
            likely = outlooks(self._recipe, artifact, self._source, smaller)
            # the most promising one last: it lies there when the best of them is measured
            built = [self._option(artifact, outlook.compress) for outlook in reversed(likely[:MOST_STRUCTURES])]
            tried = sorted((option for option in reversed(built) if option is not None), key=_expected)
            if self._n_measured > 1:
                tried[:1] = [self._measured(option) for option in tried[:1]]
            found += tried
        if not found:
            raise BudgetError(f"nothing fits the budget as {artifact} once the weights are known; give a little more")
        best, *others = sorted(found, key=_expected)
        return [self._measured(best) if self._n_measured == 1 else best, *others]

    def _option(self, artifact: str, choice: CompressChoice) -> _Option | None:
        """A structure with the best types that fit; None if none do."""
        try:
            untyped = untyped_file_of(self._recipe, artifact, self._source, choice)
            units_of(untyped, self._source.storage_type)  # refused now, before the structure is built
        except UnsupportedError:
            return None

        def units(student: Student) -> tuple[UnitPlan, ...]:
            return units_of(untyped, self._source.storage_type, student.stored_types)

        def usual_units(student: Student) -> list[UnitPlan]:
            return [unit.without(LAST_RESORT) for unit in units(student)]

        trial, file = self._alone(self._trial(choice)), untyped.choice
        name = f"{artifact}-{file.quantizer}-{file.inputs}-{untyped.budget.kind}"  # what its numbers depend on
        seconds = most_seconds(untyped, self._wishes.prefer)
        # the tables of the types of the last resort alone take ggml's library ten seconds of every process
        usual = trial.table(usual_units, f"{name}-usual")
        fitted = best_fit(untyped, usual, seconds) or best_fit(untyped, trial.table(units, name, usual), seconds)
        if fitted is None:
            return None
        predicted = trial.divergence() + self._model.divergence(fitted.allocation.order)
        return _Option(trial, artifact, fitted, predicted)

    def _measured(self, option: _Option) -> _Option:
        """Returns the option with its measured divergence."""
        trial = self._alone(option.trial)
        return replace(option, measured=measured_divergence(trial, option.artifact, option.fitted.choice))

    def _calibrate(self, found: Sequence[_Option]) -> None:
        """Fits the divergence model to the measured options, for later predictions."""
        points = [
            (option.fitted.allocation.order, option.measured)
            for option in found
            if option.measured and option.fitted.allocation.order.routed > 0 and option.trial.divergence() == 0.0
        ]
        self._model = DivergenceModel.fitted(points) if points else DivergenceModel()

    def _trial(self, choice: CompressChoice) -> Trial:
        """The trial of a structure, built and trained for a short while if it is not the original."""
        if choice not in self._trials:
            number = 0 if choice == whole(self._source.spec) else 1 + self._structures.index(choice)
            self._trials[choice] = Trial.of(self._context, choice, number)
        return self._trials[choice]

    def _alone(self, trial: Trial) -> Trial:
        """Returns the trial, after removing the students of the others, of which each takes as much disk as a model.

        A student that is needed again is built again, the same one.
        """
        if not trial.is_original:
            for other in self._trials.values():
                if other is not trial and not other.is_original:
                    other.remove()
        return trial

    def _baselines(self, artifact: str, n_measured: int) -> Iterator[Candidate]:
        """The largest of the named mixes that fit, with all experts and the kernels' codes."""
        original = whole(self._source.spec)
        if original not in self._structures:
            return
        untyped = untyped_file_of(self._recipe, artifact, self._source, original)
        for choice, prediction in fitting_mixes(untyped)[: max(0, n_measured)]:
            divergence = measured_divergence(self._trial(original), artifact, choice)
            yield Candidate(artifact, original, choice, prediction.file, None, divergence, is_baseline=True)


def _expected(option: _Option) -> float:
    return option.expected


def _measured_divergence(candidate: Candidate) -> float:
    assert candidate.measured is not None, "only what was measured is compared"
    return candidate.measured

"""Finds the file of a model that is expected to be the best on each machine; nothing is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import BudgetError
from compressors.model.sources.source import Source
from exporter.estimating.prediction import Prediction
from exporter.machines.known import Machine
from exporter.machines.placement import Placement, placed
from exporter.planning.compression import described_compression, expected_spec
from exporter.planning.flags import Flags
from exporter.planning.planner import open_recipe
from exporter.planning.recipe import CompressChoice, FileChoice, TextChoice
from exporter.searching.outlook import outlooks_of_all
from exporter.searching.structures import structures_for, whole
from exporter.writing.gguf.layout import PlannedTensor, bits_per_weight, plan_tensors

__all__ = ["Fit", "NoFit", "fits_on"]

BAND = 2.0
"""A measured divergence lies within the expected one divided by, and times, this factor; how often that is true, and on
which models it was measured, is in docs/fits.md."""

_DOES_NOT_DIVIDE = (
    "attention, cache and whole layers of experts do not divide between the card and the memory: lower --context, "
    "or store the cache with --kv-type q8_0"
)

_ANY_TEXT = TextChoice(calibration_blocks=1, selection_blocks=1, heldout_chunks_per_file=1)  # sizes do not depend on it


@dataclass(frozen=True)
class Fit:
    """The file that is expected to be the best for a machine."""

    machine: Machine
    prediction: Prediction
    choice: FileChoice
    keeps: str
    bits_per_weight: float
    divergence: float  # from the original, nats: a guess
    placement: Placement
    context: int
    kv_type: str

    @property
    def band(self) -> tuple[float, float]:
        """The divergences, nats, between which the measured one is expected."""
        return self.divergence / BAND, self.divergence * BAND


@dataclass(frozen=True)
class NoFit:
    """A machine that is too small."""

    machine: Machine
    why: str


def fits_on(
    machines: Sequence[Machine], checkpoint: Source, name: str, context: int, kv_type: str
) -> Iterator[Fit | NoFit]:
    """Finds the best GGUF file for each machine.

    Args:
        machines: the machines.
        checkpoint: the original; only headers are read.
        name: its name.
        context: tokens of cache to count, at most the model's.
        kv_type: the type of llama.cpp's cache.

    Raises:
        UnsupportedError: no GGUF file can hold the model.
    """
    for machine in machines:
        yield _row(machine, machine.budget, checkpoint, name, context, kv_type)


def _row(machine: Machine, budget: int, checkpoint: Source, name: str, context: int, kv_type: str) -> Fit | NoFit:
    """The best file of a budget; of a smaller one where its layers do not divide between a card and the memory."""
    job = Flags(budget=f"{budget}B", formats="gguf", context=context, kv_type=kv_type).job()
    recipe, structures = open_recipe(job, checkpoint, name, _ANY_TEXT), structures_for(job.search, checkpoint.spec)
    try:
        best, *_ = outlooks_of_all(recipe, checkpoint, structures, recipe.artifacts)["gguf"]
    except BudgetError as error:
        return NoFit(machine, str(error))
    student, choice = expected_spec(best.compress, checkpoint.spec), best.fitted.choice
    tensors = plan_tensors(student, choice.mix, choice.tensors)
    placement = placed(student, tensors, best.fitted.prediction, machine)
    if placement is None:
        if budget < machine.budget:
            return NoFit(machine, _DOES_NOT_DIVIDE)
        return _row(machine, budget - _bytes_of_a_layer(tensors), checkpoint, name, context, kv_type)
    return Fit(
        machine,
        best.fitted.prediction,
        choice,
        keeps=_kept(best.compress, checkpoint.spec),
        bits_per_weight=bits_per_weight(tensors),
        divergence=best.divergence,
        placement=placement,
        context=recipe.budget.context,
        kv_type=recipe.budget.kv_type,
    )


def _bytes_of_a_layer(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes of the largest layer's experts, which lie in one memory, and of the embedding, which may lie in both."""
    experts = Counter[int | None]()
    for tensor in tensors:
        experts[tensor.layer] += tensor.n_bytes if tensor.role.is_expert else 0
    return max(experts.values()) + sum(t.n_bytes for t in tensors if t.role is Role.TOKEN_EMBEDDING)


def _kept(choice: CompressChoice, teacher: ModelSpec) -> str:
    """The structure in few words."""
    if choice == whole(teacher):
        return "all experts"
    return described_compression(choice, teacher).replace(" per layer", "").replace(" per expert", "")

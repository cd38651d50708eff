"""Chooses the recipe: how many experts to keep and how many bits to give them, so that every artifact fits the budget.

The rule is simple and honest about public evidence, which says that bits are cheaper to give up than experts: keep all
experts and lower the type down to 4 bits; only when that does not fit, drop experts, as few as possible. Each artifact
then takes the largest type that fits it. Names, shapes and bytes decide; no weight is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.calibration import Splits
from compressors.model.arithmetic import fastest_arithmetic
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import BudgetError, InputError
from compressors.recover.router_kd import RouterKdSettings
from exporter.budget import predict
from exporter.gguf.layout import PRESETS as GGUF_PRESETS
from exporter.job import Job
from exporter.prediction import Prediction
from exporter.recipe import BudgetChoice, CompressChoice, Recipe, RecoverChoice, SourceChoice, TextChoice
from exporter.sizes import format_size

__all__ = ["HELDOUT_CHUNKS", "TextCounts", "choose_recipe", "predict_recipe"]

_LADDER: Mapping[str, Sequence[str]] = {
    "gguf": ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"),
    "onnx": ("F32", "Q4_0"),
}
"""Types that the rule may choose, largest first. F32 is left out of GGUF: it only repeats a 16-bit source's values."""

_ONNX_FOR_PINNED_QUANT = {name: "F32" if name in ("F32", "BF16") else "Q4_0" for name in GGUF_PRESETS}
"""ONNX Runtime's operators offer float32 and 4 bits; a pinned ``--quant`` takes the nearer one."""

_DEFAULT_BLOCKS = 320  # 163,840 tokens: 40 steps of Router KD
_SELECTION_BLOCKS = 20
HELDOUT_CHUNKS = 50
"""Chunks that the report measures, of all files together."""


@dataclass(frozen=True)
class TextCounts:
    """Blocks of 512 tokens that each split can give."""

    calibration: int
    selection: int
    heldout_files: int


@dataclass(frozen=True)
class _Candidate:
    n_experts: int
    types: Mapping[str, str]
    predictions: Mapping[str, Prediction]


def choose_recipe(
    job: Job, checkpoint: Checkpoint, name: str, splits: Splits, counts: TextCounts
) -> tuple[Recipe, dict[str, Prediction]]:
    """The recipe for a job, and what is predicted of each artifact.

    Raises:
        InputError: ``--experts`` is not possible for this model.
        BudgetError: nothing fits; the message names the smallest budget that would work.
    """
    assert job.budget_bytes is not None, "only a recipe may stand in for the budget"
    budget = BudgetChoice(
        bytes=job.budget_bytes,
        kind=job.budget_kind,  # type: ignore[arg-type]  # Job.create checked it
        context=min(job.context, checkpoint.shape.context_length),
        kv_type=job.kv_type,  # type: ignore[arg-type]
    )
    chosen = _Search(job, checkpoint, name, budget).best()
    pruned = chosen.n_experts < checkpoint.shape.n_experts
    recipe = Recipe(
        source=SourceChoice(model=name, identity=checkpoint.identity()),
        budget=budget,
        text=TextChoice(
            calibration_blocks=min(_DEFAULT_BLOCKS, counts.calibration)
            if job.recover != "router:published"
            else min(RouterKdSettings.PUBLISHED_BLOCKS, counts.calibration),
            selection_blocks=min(_SELECTION_BLOCKS, counts.selection),
            heldout_chunks_per_file=max(1, HELDOUT_CHUNKS // counts.heldout_files),
            calibration_sha256=splits.calibration.sha256,
            selection_sha256=splits.selection.sha256,
            heldout_sha256=splits.heldout.sha256,
        ),
        arithmetic=fastest_arithmetic(checkpoint.shape, checkpoint.dtype, job.device),
        compress=CompressChoice(method="reap" if pruned else "none", experts=chosen.n_experts),
        recover=_recovery(job, checkpoint, counts, pruned),
        gguf=chosen.types.get("gguf"),
        onnx=chosen.types.get("onnx"),
        save_student=job.save_student,
        threads=job.threads,
    )
    return recipe, dict(chosen.predictions)


def predict_recipe(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Prediction]:
    """What a given recipe's artifacts need.

    Raises:
        InputError: the recipe keeps more experts than there are, or fewer than the model's top-k.
        BudgetError: an artifact exceeds the recipe's budget.
    """
    _check_experts("compress.experts", recipe.compress.experts, checkpoint)
    shape = checkpoint.shape.with_experts(recipe.compress.experts)
    predictions = {}
    for artifact in recipe.artifacts:
        weight_type = recipe.type_of(artifact) or ""
        prediction = predict(
            artifact, checkpoint.folder, recipe.source.model, shape, weight_type, recipe.budget, recipe.threads
        )
        needed = prediction.counted(recipe.budget.kind)
        if needed > recipe.budget.bytes:
            raise BudgetError(
                f"the recipe's {artifact} in {weight_type} needs {format_size(needed)}, which exceeds its budget of "
                f"{format_size(recipe.budget.bytes)}: raise the budget or lower the experts or the type"
            )
        predictions[artifact] = prediction
    return predictions


class _Search:
    """Tries expert counts from all downwards, and for each the types of each artifact."""

    def __init__(self, job: Job, checkpoint: Checkpoint, name: str, budget: BudgetChoice) -> None:
        self._job = job
        self._checkpoint = checkpoint
        self._name = name
        self._budget = budget

    def best(self) -> _Candidate:
        if self._job.experts is not None:
            _check_experts("--experts", self._job.experts, self._checkpoint)
            counts: Sequence[int] = [self._job.experts]
        else:
            shape = self._checkpoint.shape
            counts = range(shape.n_experts, shape.top_k - 1, -1)
        # fewer experts never need more bytes, so the first count that fits is found by halving
        first = bisect_left(counts, True, key=lambda n_experts: self._with_experts(n_experts) is not None)
        candidate = self._with_experts(counts[first]) if first < len(counts) else None
        if candidate is None:
            raise BudgetError(self._nothing_fits(counts[-1]))
        return candidate

    def _with_experts(self, n_experts: int) -> _Candidate | None:
        types, predictions = {}, {}
        for artifact in self._job.formats:
            for weight_type in self._types(artifact):
                prediction = self._predict(artifact, n_experts, weight_type)
                if prediction.counted(self._budget.kind) <= self._budget.bytes:
                    types[artifact], predictions[artifact] = weight_type, prediction
                    break
            else:
                return None
        return _Candidate(n_experts, types, predictions)

    def _types(self, artifact: str) -> Sequence[str]:
        quant = self._job.quant
        if quant is None:
            return _LADDER[artifact]
        return [quant if artifact == "gguf" else _ONNX_FOR_PINNED_QUANT[quant]]

    def _predict(self, artifact: str, n_experts: int, weight_type: str) -> Prediction:
        shape = self._checkpoint.shape.with_experts(n_experts)
        return predict(
            artifact, self._checkpoint.folder, self._name, shape, weight_type, self._budget, self._job.threads
        )

    def _nothing_fits(self, n_experts: int) -> str:
        needs = {
            artifact: min(
                (self._predict(artifact, n_experts, weight_type).counted(self._budget.kind), weight_type)
                for weight_type in self._types(artifact)
            )
            for artifact in self._job.formats
        }
        largest = max(needs, key=lambda artifact: needs[artifact][0])
        n_bytes, weight_type = needs[largest]
        counted = "file" if self._budget.kind == "file" else f"memory at {self._budget.context} tokens of context"
        return (
            f"nothing fits a budget of {format_size(self._budget.bytes)}: with {n_experts} experts per layer the "
            f"smallest {largest} ({weight_type}) needs {format_size(n_bytes)} of {counted}. "
            f"The smallest budget that works is --budget {n_bytes}B"
        )


def _check_experts(what: str, n_experts: int, checkpoint: Checkpoint) -> None:
    shape = checkpoint.shape
    if not shape.top_k <= n_experts <= shape.n_experts:
        raise InputError(
            f"{what}: {n_experts} experts cannot be kept; the model has {shape.n_experts} per layer and uses "
            f"{shape.top_k} for each token, so give a number from {shape.top_k} to {shape.n_experts}"
        )


def _recovery(job: Job, checkpoint: Checkpoint, counts: TextCounts, pruned: bool) -> RecoverChoice:
    """Routers are taught again when experts were dropped, or when it is asked for by name."""
    if job.recover == "router:published":
        settings = RouterKdSettings.published(min(RouterKdSettings.PUBLISHED_BLOCKS, counts.calibration))
    else:
        n_blocks = min(_DEFAULT_BLOCKS, counts.calibration)
        settings = RouterKdSettings.sized(checkpoint.shape.hidden_size, n_blocks, job.seed)
    wanted = job.recover.startswith("router") or (job.recover == "auto" and pruned)
    return RecoverChoice(
        rung="router" if wanted else "none",
        blocks=settings.n_blocks if wanted else 0,
        blocks_per_step=settings.blocks_per_step,
        learning_rate=settings.learning_rate,
        seed=job.seed,
    )

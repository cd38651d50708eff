"""Chooses the recipe: how many experts to keep and how many bits to give them, so that every artifact fits the budget.

The rule is simple and honest about public evidence, which says that bits are cheaper to give up than experts: keep
everything and lower the type down to 4 bits; only when that does not fit, compress by the method, as little as
possible. Each artifact then takes the largest type that fits it. Names, shapes and bytes decide; no weight is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.calibration import BlockCounts, Splits
from compressors.dense import check_dense
from compressors.model.arithmetic import fastest_arithmetic
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import BudgetError, InputError, UnsupportedError
from compressors.recover.schedule import Schedule
from compressors.slim import GGUF_WIDTH_MULTIPLE
from exporter.budget import predict
from exporter.compression import check_compression, described_compression, expected_shape, fewest_experts
from exporter.gguf.mixes import ALIASES, MIXES
from exporter.job import METHODS_WITHOUT_EXPERTS, Job
from exporter.prediction import Prediction
from exporter.recipe import BudgetChoice, CompressChoice, Recipe, SourceChoice, TextChoice
from exporter.recovery import Machine, RefusedRung, check_after_quantizing, choose_ladder
from exporter.sizes import format_size

__all__ = ["HELDOUT_CHUNKS", "TextCounts", "choose_recipe", "predict_recipe", "wanted_blocks"]

_LADDER: Mapping[str, Sequence[str]] = {
    "gguf": ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"),
    "onnx": ("F32", "Q4_0"),
}
"""Types that the rule may choose, largest first. F32 is left out of GGUF: it only repeats a 16-bit source's values."""

_ONNX_FOR_PINNED_QUANT = {
    name: ("F32",) if name in ("F32", "BF16", "F16") else ("Q4_0", "F32") for name in (*MIXES, *ALIASES)
}
"""ONNX Runtime's operators offer float32 and 4 bits; a pinned ``--quant`` takes the nearer one that holds the model."""

_DEFAULT_METHOD = "reap"

_SEQUENTIAL = frozenset({"ream"})
"""Methods that are defined with the layers in front compressed already."""

_CALIBRATION_BLOCKS = 320  # 163,840 tokens
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
    compress: CompressChoice
    types: Mapping[str, str]
    predictions: Mapping[str, Prediction]


def choose_recipe(
    job: Job, checkpoint: Checkpoint, name: str, splits: Splits, counts: TextCounts, memory_bytes: int
) -> tuple[Recipe, dict[str, Prediction], tuple[RefusedRung, ...]]:
    """The recipe for a job, what is predicted of each artifact, and the rungs of recovery that do not fit the memory.

    Raises:
        InputError: ``--experts`` is not possible for this model.
        UnsupportedError: a dense student is asked for, and the family has no dense counterpart.
        BudgetError: nothing fits; the message names the smallest budget that would work.
    """
    assert job.budget_bytes is not None, "only a recipe may stand in for the budget"
    budget = BudgetChoice(
        bytes=job.budget_bytes,
        kind=job.budget_kind,  # type: ignore[arg-type]  # Flags checked it
        context=min(job.context, checkpoint.shape.context_length),
        kv_type=job.kv_type,  # type: ignore[arg-type]
    )
    chosen = _Search(job, checkpoint, name, budget).best()
    wanted = wanted_blocks(job, counts.heldout_files)
    n_blocks = min(wanted.calibration, counts.calibration)
    recover, refused = choose_ladder(
        _wanted_recovery(job, checkpoint, chosen.compress),
        expected_shape(chosen.compress, checkpoint.shape),
        checkpoint.dtype.itemsize,
        Machine(memory_bytes, n_blocks, models_stay=checkpoint.n_bytes < memory_bytes // 2),
        job.seed,
    )
    recipe = Recipe(
        source=SourceChoice(model=name, identity=checkpoint.identity()),
        budget=budget,
        text=TextChoice(
            calibration_blocks=n_blocks,
            selection_blocks=min(wanted.selection, counts.selection),
            heldout_chunks_per_file=wanted.heldout_per_file,
            calibration_sha256=splits.calibration.sha256,
            selection_sha256=splits.selection.sha256,
            heldout_sha256=splits.heldout.sha256,
        ),
        arithmetic=fastest_arithmetic(checkpoint.shape, checkpoint.dtype, job.device),
        compress=chosen.compress,
        recover=recover,
        gguf=chosen.types.get("gguf"),
        onnx=chosen.types.get("onnx"),
        save_student=job.save_student,
        threads=job.threads,
    )
    check_compression(recipe, checkpoint.shape)
    return recipe, dict(chosen.predictions), refused


def wanted_blocks(job: Job, n_heldout_files: int) -> BlockCounts:
    """Returns how many blocks of text a recipe for the job takes; a short text gives fewer."""
    calibration = Schedule.PUBLISHED_BLOCKS if job.recover == "router:published" else _CALIBRATION_BLOCKS
    return BlockCounts(calibration, _SELECTION_BLOCKS, max(1, HELDOUT_CHUNKS // n_heldout_files))


def predict_recipe(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Prediction]:
    """Predicts the memory and size of a recipe's artifacts.

    Raises:
        InputError: the recipe asks for what this model does not have, such as more experts than there are.
        UnsupportedError: an artifact cannot hold what it asks for.
        BudgetError: an artifact exceeds the recipe's budget.
    """
    check_compression(recipe, checkpoint.shape)
    if recipe.budget.context > checkpoint.shape.context_length:
        raise InputError(
            f"the recipe's budget.context is {recipe.budget.context} tokens, and the model was made for "
            f"{checkpoint.shape.context_length}; lower it"
        )
    shape = expected_shape(recipe.compress, checkpoint.shape)
    check_after_quantizing(recipe.recover, shape)
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
    """Tries the method's choices from the one that changes least, and for each the types of each artifact."""

    def __init__(self, job: Job, checkpoint: Checkpoint, name: str, budget: BudgetChoice) -> None:
        self._job = job
        self._checkpoint = checkpoint
        self._name = name
        self._budget = budget

    def best(self) -> _Candidate:
        choices = self._choices()
        if (candidate := self._fitting(choices[0])) is not None:
            return candidate
        # a choice further on never needs more bytes, so the first that fits is found by halving
        first = bisect_left(choices, True, lo=1, key=lambda choice: self._fitting(choice) is not None)
        candidate = self._fitting(choices[first]) if first < len(choices) else None
        if candidate is None:
            raise BudgetError(self._nothing_fits(choices[-1]))
        return candidate

    def _choices(self) -> Sequence[CompressChoice]:
        method, shape = self._job.method, self._checkpoint.shape
        whole = CompressChoice(experts=shape.n_experts)
        if self._job.student == "dense":
            check_dense(shape)
            return [whole.model_copy(update={"student": "dense"})]
        if self._job.experts is not None:
            _check_experts(self._job, self._checkpoint)
            return [_with_experts(method, self._job.experts, whole)]
        if method == "slim":
            widths = range(shape.expert_width - 1, 0, -1)
            return [whole, *(_with(whole, width=width) for width in widths if width % GGUF_WIDTH_MULTIPLE == 0)]
        if method == "block-drop":
            return [_with(whole, drop_blocks=n_blocks) for n_blocks in range(shape.n_layers)]
        if method == "layer-drop":
            return [_with(whole, drop_moe_layers=n_layers) for n_layers in range(shape.n_layers)]
        counts = range(shape.n_experts, fewest_experts(method, shape) - 1, -1)
        return [_with_experts(method, n_experts, whole) for n_experts in counts]

    def _fitting(self, choice: CompressChoice) -> _Candidate | None:
        types, predictions = {}, {}
        for artifact in self._job.formats:
            for weight_type, prediction in self._possible(artifact, choice).items():
                if prediction.counted(self._budget.kind) <= self._budget.bytes:
                    types[artifact], predictions[artifact] = weight_type, prediction
                    break
            else:
                return None
        return _Candidate(choice, types, predictions)

    def _possible(self, artifact: str, choice: CompressChoice) -> dict[str, Prediction]:
        """The predictions by type, for each type that can hold the student: rows may not fit a type's blocks.

        Raises:
            UnsupportedError: no type can; the reason is that of the largest.
        """
        possible, refusal = {}, None
        for weight_type in self._types(artifact):
            try:
                possible[weight_type] = self._predict(artifact, choice, weight_type)
            except UnsupportedError as error:
                refusal = refusal or error
        if not possible and refusal is not None:
            raise refusal
        return possible

    def _types(self, artifact: str) -> Sequence[str]:
        quant = self._job.quant
        if quant is None:
            return _LADDER[artifact]
        return [quant] if artifact == "gguf" else _ONNX_FOR_PINNED_QUANT[quant]

    def _predict(self, artifact: str, choice: CompressChoice, weight_type: str) -> Prediction:
        shape = expected_shape(choice, self._checkpoint.shape)
        return predict(
            artifact, self._checkpoint.folder, self._name, shape, weight_type, self._budget, self._job.threads
        )

    def _nothing_fits(self, choice: CompressChoice) -> str:
        needs = {
            artifact: min(
                (prediction.counted(self._budget.kind), weight_type)
                for weight_type, prediction in self._possible(artifact, choice).items()
            )
            for artifact in self._job.formats
        }
        largest = max(needs, key=lambda artifact: needs[artifact][0])
        n_bytes, weight_type = needs[largest]
        counted = "file" if self._budget.kind == "file" else f"memory at {self._budget.context} tokens of context"
        left = described_compression(choice, self._checkpoint.shape)
        return (
            f"nothing fits a budget of {format_size(self._budget.bytes)}: with {left} the "
            f"smallest {largest} ({weight_type}) needs {format_size(n_bytes)} of {counted}. "
            f"The smallest budget that works is --budget {n_bytes}B"
        )


def _with(choice: CompressChoice, **changes: int) -> CompressChoice:
    return choice.model_copy(update=changes)


def _with_experts(method: str, n_experts: int, whole: CompressChoice) -> CompressChoice:
    if n_experts == whole.experts:
        return whole
    chosen = _DEFAULT_METHOD if method == "auto" else method
    return whole.model_copy(update={"method": chosen, "experts": n_experts, "sequential": chosen in _SEQUENTIAL})


def _check_experts(job: Job, checkpoint: Checkpoint) -> None:
    shape, n_experts = checkpoint.shape, job.experts
    if job.method in METHODS_WITHOUT_EXPERTS:
        raise InputError(f"--experts: --method {job.method} keeps all experts; leave --experts out, or name another")
    fewest = fewest_experts(job.method, shape)
    if n_experts is None or not fewest <= n_experts <= shape.n_experts:
        raise InputError(
            f"--experts: {n_experts} experts cannot be kept; the model has {shape.n_experts} per layer and uses "
            f"{shape.top_k} for each token, so give a number from {fewest} to {shape.n_experts}"
        )


def _wanted_recovery(job: Job, checkpoint: Checkpoint, chosen: CompressChoice) -> str:
    """The recovery to plan: none if nothing was compressed, unless the user named one."""
    unchanged = chosen == CompressChoice(experts=checkpoint.shape.n_experts)
    return "none" if job.recover == "auto" and unchanged else job.recover

"""Makes the recipe of a job before a weight is read.

A job that names the mix (``--quant``) gets as much of the model as fits with it. Otherwise every tensor gets a type of
its own by sensitivities that ship with the package, and the search measures those of the model and decides again
(:mod:`exporter.searching.search`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.calibration.mixture import WeightedText
from compressors.calibration.splits import BlockCounts, Splits
from compressors.model.errors import BudgetError, InputError, UnsupportedError
from compressors.model.running.arithmetic import fastest_arithmetic
from compressors.model.sources.source import Source
from compressors.recover.schedule import Schedule
from compressors.shrink.registry import BLOCK_DROP, KEEPS_EXPERTS, LAYER_DROP, LIGHT_MOE, SLIM, expert_counts
from compressors.shrink.slim import GGUF_WIDTH_MULTIPLE
from exporter.estimating.budget import predict
from exporter.estimating.prediction import Prediction
from exporter.estimating.sizes import format_size
from exporter.planning.compression import check_compression, described_compression, expected_spec
from exporter.planning.job import Job
from exporter.planning.recipe import (
    BudgetChoice,
    CompressChoice,
    FileChoice,
    MixedText,
    Recipe,
    RecoverChoice,
    SourceChoice,
    TextChoice,
)
from exporter.planning.recovery import CALIBRATION_BLOCKS, RefusedRung, check_after_quantizing
from exporter.planning.resulting_spec import layers_with_experts
from exporter.searching.ladder import ladder, machine_for
from exporter.searching.no_fit import nothing_fits
from exporter.searching.outlook import outlook_of, outlooks_of_all
from exporter.searching.structures import replacements, structures_for, whole, with_experts
from exporter.writing.files import sha256_of

__all__ = ["HELDOUT_CHUNKS", "TextCounts", "choose_recipe", "mix_of", "open_recipe", "predict_recipe", "wanted_blocks"]


def _onnx_presets(quant: str) -> Sequence[str]:
    """The ONNX presets for a mix: float32 or 4 bits, whichever is nearer and holds the model."""
    return ("F32",) if quant in ("F32", "BF16", "F16") else ("Q4_0", "F32")


_REPLACED_STEP = 1 / 50  # of the shares of the experts that replacing may remove
_SELECTION_BLOCKS = 20
HELDOUT_CHUNKS = 50
"""The number of chunks that the report measures, over all files."""


@dataclass(frozen=True)
class TextCounts:
    """Blocks of 512 tokens that each split can give."""

    calibration: int
    selection: int
    heldout_files: int
    mixture: str = ""  # the files that the calibration blocks come from, if there are several


@dataclass(frozen=True)
class _Candidate:
    compress: CompressChoice
    files: Mapping[str, FileChoice]
    predictions: Mapping[str, Prediction]


def choose_recipe(
    job: Job, checkpoint: Source, name: str, splits: Splits, counts: TextCounts, memory_bytes: int
) -> tuple[Recipe, dict[str, Prediction], tuple[RefusedRung, ...]]:
    """The recipe for a job, the prediction of each artifact, and the rungs of recovery that do not fit the memory.

    Raises:
        InputError: ``--experts`` is not possible for this model.
        UnsupportedError: a dense student is asked for, and the family has no dense counterpart.
        BudgetError: nothing fits; the message names the smallest budget that would work.
    """
    assert job.budgets, "only a recipe may stand in for the budget"
    wanted = wanted_blocks(job, counts.heldout_files)
    n_blocks = min(wanted.calibration, counts.calibration)
    text = TextChoice(
        calibration_blocks=n_blocks,
        selection_blocks=min(wanted.selection, counts.selection),
        heldout_chunks_per_file=wanted.heldout_per_file,
        calibration_sha256=splits.calibration.sha256,
        selection_sha256=splits.selection.sha256,
        heldout_sha256=splits.heldout.sha256,
        mix=mix_of(job.calibration),
    )
    undecided = open_recipe(job, checkpoint, name, text)
    chosen = _Pinned(job, checkpoint, undecided).best() if job.quant else _expected(job, checkpoint, undecided)
    machine = machine_for(checkpoint, memory_bytes, n_blocks)
    recover, refused = ladder(job.recover, chosen.compress, checkpoint, machine, job.seed)
    recipe = undecided.model_copy(update={"compress": chosen.compress, "recover": recover, **chosen.files})
    check_compression(recipe, checkpoint.spec)
    return recipe, dict(chosen.predictions), refused


def mix_of(texts: Sequence[WeightedText]) -> tuple[MixedText, ...]:
    """Several texts, or chats, as a recipe names them; nothing of a single plain text."""
    if len(texts) < 2 and not any(text.is_chats for text in texts):
        return ()
    return tuple(MixedText(file=text.path.name, weight=text.weight) for text in texts)


def open_recipe(job: Job, checkpoint: Source, name: str, text: TextChoice) -> Recipe:
    """A recipe that holds all that the job names, and leaves the structure and the types of its files open."""
    file = FileChoice(
        mix=job.quant or "Q8_0",
        quantizer=job.quantizer,  # type: ignore[arg-type]  # Flags checked it
        imatrix=None if job.imatrix is None else sha256_of(job.imatrix),
    )
    return Recipe(
        source=SourceChoice(model=name, identity=checkpoint.identity(), keep_mtp=job.keep_mtp),
        budget=BudgetChoice(
            bytes=job.budgets[0],
            kind=job.budget_kind,  # type: ignore[arg-type]
            context=min(job.context, checkpoint.spec.context_length),
            kv_type=job.kv_type,  # type: ignore[arg-type]
        ),
        text=text,
        arithmetic=fastest_arithmetic(checkpoint.spec, checkpoint.storage_type, job.device),
        compress=whole(checkpoint.spec),
        recover=RecoverChoice(seed=job.seed),
        gguf=file if "gguf" in job.formats else None,
        onnx=file if "onnx" in job.formats else None,
        save_student=job.save_student,
        threads=job.threads,
    )


def _expected(job: Job, checkpoint: Source, recipe: Recipe) -> _Candidate:
    """The candidate that the search is expected to find: the structure that is best for the worst-served file.

    The search measures, and may give each file a student of its own.

    Raises:
        BudgetError: nothing fits; the message names the smallest budget that would work.
    """
    if job.experts is not None:
        _check_experts(job, checkpoint)
    structures = structures_for(job.search, checkpoint.spec)
    found = outlooks_of_all(recipe, checkpoint, structures, recipe.artifacts)
    worst_served = max(found, key=lambda artifact: found[artifact][0].divergence)
    known = {(artifact, outlook.compress): outlook for artifact in found for outlook in found[artifact]}
    for choice in [outlook.compress for outlook in found[worst_served]]:
        shared = {  # an artifact that the original serves well enough was looked at with the original alone
            artifact: known.get((artifact, choice)) or outlook_of(recipe, artifact, checkpoint, choice)
            for artifact in recipe.artifacts
        }
        fitted = {artifact: outlook.fitted for artifact, outlook in shared.items() if outlook is not None}
        if len(fitted) == len(shared):
            files = {artifact: entry.choice for artifact, entry in fitted.items()}
            return _Candidate(choice, files, {artifact: entry.prediction for artifact, entry in fitted.items()})
    raise BudgetError("no structure fits the budget as GGUF and as ONNX: choose one of --formats, or raise --budget")


def wanted_blocks(job: Job, n_heldout_files: int) -> BlockCounts:
    """Returns how many blocks of text a recipe for the job takes; a short text gives fewer."""
    calibration = Schedule.PUBLISHED_BLOCKS if job.recover == "router:published" else CALIBRATION_BLOCKS
    return BlockCounts(calibration, _SELECTION_BLOCKS, max(1, HELDOUT_CHUNKS // n_heldout_files))


def predict_recipe(recipe: Recipe, checkpoint: Source) -> dict[str, Prediction]:
    """Predicts the memory and size of a recipe's artifacts.

    Raises:
        InputError: the recipe does not fit this model, for example because it asks for more experts than there are.
        UnsupportedError: an artifact cannot hold the result.
        BudgetError: an artifact exceeds the recipe's budget.
    """
    check_compression(recipe, checkpoint.spec)
    if recipe.budget.context > checkpoint.spec.context_length:
        raise InputError(
            f"the recipe's budget.context is {recipe.budget.context} tokens, and the model was made for "
            f"{checkpoint.spec.context_length}; lower it"
        )
    spec = expected_spec(recipe.compress, checkpoint.spec)
    check_after_quantizing(recipe.recover, spec)
    predictions = {}
    for artifact in recipe.artifacts:
        choice = recipe.file(artifact)
        prediction = predict(artifact, checkpoint, recipe.source.model, spec, choice, recipe.budget, recipe.threads)
        needed = prediction.counted(recipe.budget.kind)
        if needed > recipe.budget.bytes:
            raise BudgetError(
                f"the recipe's {artifact} in {choice.mix} needs {format_size(needed)}, which exceeds its budget of "
                f"{format_size(recipe.budget.bytes)}: raise the budget or lower the experts or the type"
            )
        predictions[artifact] = prediction
    return predictions


class _Pinned:
    """Tries a method's choices for a job that names the mix, beginning with the one that changes least."""

    def __init__(self, job: Job, checkpoint: Source, recipe: Recipe) -> None:
        self._job = job
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._budget = recipe.budget

    def best(self) -> _Candidate:
        choices = self._choices()
        if (candidate := self._fitting(choices[0])) is not None:
            return candidate
        # a later choice never needs more bytes, so the first that fits is found by bisection
        first = bisect_left(choices, True, lo=1, key=lambda choice: self._fitting(choice) is not None)
        candidate = self._fitting(choices[first]) if first < len(choices) else None
        if candidate is None:
            raise self._nothing_fits(choices[-1])
        return candidate

    def _choices(self) -> Sequence[CompressChoice]:
        """The method's choices, from the one that changes least to the one that changes most."""
        method, spec = self._job.method, self._checkpoint.spec
        original, n_layers = whole(spec), len(layers_with_experts(spec))
        if self._job.student == "dense" or self._job.experts is not None:
            if self._job.experts is not None:
                _check_experts(self._job, self._checkpoint)
            return structures_for(self._job.search, spec)
        if method == LIGHT_MOE.name and self._job.removed_share is None:
            return list(replacements(spec, _REPLACED_STEP, apart=not self._job.materialize))
        if method == LIGHT_MOE.name:
            return structures_for(self._job.search, spec)
        if method == SLIM.name:
            widths = range(spec.expert_width - 1, 0, -1)
            narrower = [width for width in widths if width % GGUF_WIDTH_MULTIPLE == 0]
            return [original, *(original.model_copy(update={"width": width}) for width in narrower)]
        if method == BLOCK_DROP.name:
            return [original.model_copy(update={"drop_blocks": n_blocks}) for n_blocks in range(n_layers)]
        if method == LAYER_DROP.name:
            return [original.model_copy(update={"drop_moe_layers": n_moe}) for n_moe in range(n_layers)]
        return [with_experts(method, n_experts, spec) for n_experts in expert_counts(method, spec)]

    def _fitting(self, choice: CompressChoice) -> _Candidate | None:
        files, predictions = {}, {}
        for artifact in self._job.formats:
            for mix, prediction in self._possible(artifact, choice).items():
                if prediction.counted(self._budget.kind) <= self._budget.bytes:
                    files[artifact], predictions[artifact] = self._file(mix), prediction
                    break
            else:
                return None
        return _Candidate(choice, files, predictions)

    def _possible(self, artifact: str, choice: CompressChoice) -> dict[str, Prediction]:
        """The predictions for each type that can hold the student: rows may not fit a type's blocks.

        Raises:
            UnsupportedError: no type can; the message gives the reason of the largest type.
        """
        possible, refusal = {}, None
        for mix in self._mixes(artifact):
            try:
                possible[mix] = self._predict(artifact, choice, mix)
            except UnsupportedError as error:
                refusal = refusal or error
        if not possible and refusal is not None:
            raise refusal
        return possible

    def _file(self, mix: str) -> FileChoice:
        return self._recipe.file(self._recipe.artifacts[0]).model_copy(update={"mix": mix})

    def _mixes(self, artifact: str) -> Sequence[str]:
        quant = self._job.quant
        assert quant is not None, "the job names it"
        return [quant] if artifact == "gguf" else _onnx_presets(quant)

    def _predict(self, artifact: str, choice: CompressChoice, mix: str) -> Prediction:
        source, recipe = self._checkpoint, self._recipe
        spec, name = expected_spec(choice, source.spec), recipe.source.model
        return predict(artifact, source, name, spec, self._file(mix), recipe.budget, recipe.threads)

    def _nothing_fits(self, choice: CompressChoice) -> BudgetError:
        left = described_compression(choice, self._checkpoint.spec)
        least = {
            artifact: min(
                (prediction.counted(self._budget.kind), f"{left} in {mix}")
                for mix, prediction in self._possible(artifact, choice).items()
            )
            for artifact in self._job.formats
        }
        return nothing_fits(self._budget, least)


def _check_experts(job: Job, checkpoint: Source) -> None:
    spec, n_experts = checkpoint.spec, job.experts
    if job.method in KEEPS_EXPERTS:
        raise InputError(f"--experts: --method {job.method} keeps all experts; leave --experts out, or name another")
    counts = expert_counts(job.method, spec)
    if n_experts not in counts:
        raise InputError(
            f"--experts: {n_experts} experts cannot be kept; the model has {spec.n_experts} per layer and uses "
            f"{spec.top_k} for each token, so give {_of_counts(counts)}"
        )


def _of_counts(counts: range) -> str:
    """The numbers of experts that can be kept, in words."""
    kind = "number" if counts.step == -1 else f"multiple of {-counts.step}"
    return f"a {kind} from {min(counts)} to {max(counts)}"

"""Makes the plan of a run: everything that can be decided from names, shapes and bytes; no weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressors.calibration.mixture import WeightedText
from compressors.calibration.splits import BlockCounts, Splits, block_length_of, read_splits, tokenize
from compressors.calibration.text_counts import have_enough
from compressors.model.config.special_tokens import special_tokens
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from exporter.hub import bundled_text, resolve_model
from exporter.planning.job import Job
from exporter.planning.plan import Plan
from exporter.planning.planner import TextCounts, choose_recipe, mix_of, predict_recipe, wanted_blocks
from exporter.planning.preflight import refuse_to_cut_onnx, refuse_too_short_a_context, spare_disk
from exporter.planning.recipe import MixedText, Recipe, TextChoice, load_recipe
from exporter.planning.teacher_floor import TeacherFloor, choose_teacher_floor
from exporter.processes.free_memory import free_memory
from exporter.processes.team import local_processes
from exporter.publishing.deviations import find_deviations
from exporter.publishing.model_name import model_name, whole_path
from exporter.writing.files import sha256_of

__all__ = ["make_plan", "texts_of"]

_BUNDLED_NAME = "tiny-moe"


def make_plan(job: Job, command: str, folder: Path | None = None) -> Plan:
    """Decides everything that can be decided from names, shapes and bytes; no weight is read.

    If there are several budgets, the plan is for the first.

    Args:
        job: the job.
        command: the command as it was typed.
        folder: the model's place, which may hold headers alone; None: where the job's model is, downloaded if need be.

    Raises:
        InputError: the model, a text or the recipe is wrong.
        BudgetError: nothing fits the budget.
    """
    recipe = None if job.recipe is None else load_recipe(job.recipe)
    keeps_mtp = job.keep_mtp if recipe is None else recipe.source.keep_mtp
    checkpoint = open_source(folder or resolve_model(job.model, job.revision, offline=job.offline), keeps_mtp=keeps_mtp)
    refuse_too_short_a_context(checkpoint.spec)
    calibration, heldout = texts_of(job)
    splits = read_splits(calibration, heldout)
    wanted = wanted_blocks(job, len(splits.heldout.parts)) if recipe is None else recipe.text.blocks
    counts = _counted(job, splits, checkpoint, wanted)
    memory_bytes = job.memory_bytes or free_memory() // 2 // local_processes()
    if recipe is None:
        recipe, predictions, refused = choose_recipe(job, checkpoint, _name(job), splits, counts, memory_bytes)
    else:
        recipe = _completed(job, recipe, checkpoint, splits)
        predictions, refused = predict_recipe(recipe, checkpoint), ()
    _refuse_what_a_stage_would(job, recipe, checkpoint)
    search = None if job.recipe is not None or job.quant is not None else job.search
    plan = Plan(
        recipe=recipe,
        source=whole_path(checkpoint.path),
        calibration=tuple(replace(text, path=text.path.resolve()) for text in calibration),
        heldout=None if heldout is None else heldout.resolve(),
        predictions=predictions,
        # a recipe's number of blocks is followed as it stands, whatever the clock says
        recover_seconds=job.recover_seconds if job.recipe is None else 0,
        refused_rungs=refused,
        memory_bytes=memory_bytes,
        shard_bytes=job.shard_bytes,
        device=job.device,
        require=dict(job.require),
        out=job.out.resolve(),
        command=command,
        end_tokens=special_tokens(checkpoint.tokenizer_folder, checkpoint.spec.vocab_size).ends,
        deviations=find_deviations(checkpoint, recipe.artifacts, recipe.source.model),
        may_choose_codes=search is not None and recipe.chooses_codes,
        may_train=search is not None and search.recover != "none",
        may_judge=search is not None,
        imatrix=None if job.imatrix is None else job.imatrix.resolve(),
        search=search,
        mixture=counts.mixture,
    )
    refuse_to_cut_onnx(plan)
    if not job.floors:
        return plan
    return replace(plan, teacher_floors=_teacher_floors(plan, checkpoint, spare_disk(plan, job.work_dir)))


def _refuse_what_a_stage_would(job: Job, recipe: Recipe, checkpoint: Source) -> None:
    """Refuses now what a stage would refuse hours later.

    Raises:
        InputError: a dense student's routing is required, or the importance matrix is not one of this model.
    """
    if recipe.compress.student == "dense" and "routing" in job.require:
        raise InputError("--require: a dense student has no routing to compare; leave routing out")
    if job.imatrix is not None:
        from exporter.writing.gguf.imatrix import read_imatrix  # it needs torch

        read_imatrix(job.imatrix, checkpoint.spec)


def _counted(job: Job, splits: Splits, checkpoint: Source, wanted: BlockCounts) -> TextCounts:
    """Counts the blocks of the texts.

    The bundled texts are known to be kept apart, so no more of them is tokenised than shows that they are long enough.

    Raises:
        InputError: a text is too short, or two share text.
    """
    folder, length = checkpoint.tokenizer_folder, block_length_of(checkpoint.spec.context_length)
    if not job.calibration and job.text is None and have_enough(splits, folder, length, wanted):
        return TextCounts(wanted.calibration, wanted.selection, len(splits.heldout.parts))
    calibration, selection, heldout = tokenize(splits, folder, length, wanted)
    if job.recipe is not None:
        calibration.check_has(wanted.calibration)  # refused now, not by the stage
        selection.check_has(wanted.selection)
    n_blocks = min(wanted.calibration, calibration.n_blocks)
    mixture = calibration.described_mixture(n_blocks) if mix_of(job.calibration) else ""
    return TextCounts(calibration.n_blocks, selection.n_blocks, len(heldout.blocks), mixture)


def texts_of(job: Job) -> tuple[tuple[WeightedText, ...], Path | None]:
    """The calibration texts, and the held-out text if it is a different one."""
    if not job.calibration:
        return (WeightedText(bundled_text("calibration")),), job.text or bundled_text("heldout")
    return job.calibration, job.text


def _teacher_floors(plan: Plan, checkpoint: Source, disk_bytes: int) -> dict[str, TeacherFloor]:
    """A file within the budget is loaded in any case: so much memory may be used, whatever the limit of the stages."""
    memory_bytes = max(plan.memory_bytes, *(prediction.total for prediction in plan.predictions.values()))
    chosen = {
        artifact: choose_teacher_floor(
            artifact, checkpoint, plan.recipe, memory_bytes=memory_bytes, disk_bytes=disk_bytes
        )
        for artifact in plan.recipe.artifacts
    }
    return {artifact: floor for artifact, floor in chosen.items() if floor is not None}


def _name(job: Job) -> str:
    return _BUNDLED_NAME if job.model is None else model_name(job.model)


def _completed(job: Job, recipe: Recipe, checkpoint: Source, splits: Splits) -> Recipe:
    """The recipe with what a person left open: which weights and which text, if any will do."""
    path, identity = job.recipe, checkpoint.identity()
    if recipe.source.identity not in (None, identity):
        raise InputError(
            f"{path} is a recipe for {recipe.source.model}, whose config or weights differ from the model's"
        )
    digests = {f"{name}_sha256": split.sha256 for name, split in vars(splits).items()}
    for name, split in vars(splits).items():
        if getattr(recipe.text, f"{name}_sha256") not in (None, split.sha256):
            raise InputError(f"{path} was made for another {name} text; give that with --calibration and --text")
    mix = mix_of(job.calibration)
    _refuse_another_mix(recipe.text, mix, path)
    _refuse_another_imatrix(job, recipe)
    return recipe.model_copy(
        update={
            "source": recipe.source.model_copy(update={"identity": identity}),
            "text": recipe.text.model_copy(update={**digests, "mix": mix}),
        }
    )


def _refuse_another_mix(text: TextChoice, given: tuple[MixedText, ...], path: Path | None) -> None:
    """Refuses other weights than the recipe's, or other kinds of text, unless it allows any text."""
    is_open = not text.mix and text.calibration_sha256 is None
    if not is_open and [one.effect for one in text.mix] != [one.effect for one in given]:
        wanted = " ".join(f"--calibration PATH/{one.file}:{one.weight:g}" for one in text.mix)
        raise InputError(
            f"{path} was made for another mixture of calibration texts; give "
            + (wanted or "--calibration with a single plain text")
        )


def _refuse_another_imatrix(job: Job, recipe: Recipe) -> None:
    """Refuses another importance matrix than the one whose hash the recipe names."""
    given = None if job.imatrix is None else sha256_of(job.imatrix)
    for artifact in recipe.artifacts:
        wanted = recipe.file(artifact).imatrix
        if wanted == given:
            continue
        if wanted is None:
            raise InputError(f"{job.recipe} was made without a file's importance matrix; leave --imatrix out")
        if given is None:
            raise InputError(f"{job.recipe} was made with an importance matrix for {artifact}; give it with --imatrix")
        raise InputError(f"{job.recipe} was made with another importance matrix for {artifact} than --imatrix gives")

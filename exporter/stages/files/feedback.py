"""Error feedback for a stage that writes a file, from the layer inputs of the student that it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compressors.calibration.layer_inputs import LayerInputs, write_layer_inputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.sizes import n_kept_blocks
from compressors.model.description.spec import ModelSpec
from compressors.model.running.arithmetic import dtype_of
from compressors.model.running.memory import PROCESS_BYTES
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.sensitivity.matrices import Sensitivities
from exporter.file_names import LAYER_INPUTS, OWN_LAYER_INPUTS, SENSITIVITIES
from exporter.planning.plan import Plan
from exporter.planning.recipe import Quantizer
from exporter.stages.inputs import memory_limit, token_blocks, use_threads
from exporter.work.stage import StageContext
from exporter.writing.feedback import EmbeddingGradient, StudentFeedback
from exporter.writing.feedback_memory import threads_within
from exporter.writing.files import flush_folder

__all__ = ["feedback_for", "writer_threads"]


@contextmanager
def feedback_for(
    context: StageContext, student: Student, quantizer: Quantizer, folder: Path
) -> Iterator[StudentFeedback | None]:
    """The feedback of a student's matrices; None where the kernels choose the codes.

    The inputs of the original's layers are known from calibration. A student that differs first runs the same tokens
    through its own layers, and so does the original where they are gone. Inputs that lie in the folder are this file's
    alone: a layer's go as soon as the layer is on the disk. The others stay until the file is done, so that an
    interrupted attempt to write the same student there can continue.
    """
    if quantizer == "kernel":
        yield None
        return
    dtype = dtype_of(context.plan.recipe.arithmetic)
    inputs, stay = _inputs(context, student, folder, dtype)
    threads = writer_threads(context.plan, student.spec, quantizer)
    moments = SecondMoments(student, inputs, dtype=dtype, threads=threads)
    tied = student.spec.tied_embeddings
    of_vocabulary = Sensitivities(context.work.path("sensitivity", SENSITIVITIES), tied).vocabulary
    gradient = EmbeddingGradient(of_vocabulary.embedding_gradient_moments, float(of_vocabulary.kappa))
    yield StudentFeedback(moments, tied=tied, gradient=gradient, remove=None if stay else inputs.remove)
    for own in (LAYER_INPUTS, OWN_LAYER_INPUTS):
        shutil.rmtree(own.within(folder), ignore_errors=True)


def writer_threads(plan: Plan, spec: ModelSpec, quantizer: Quantizer) -> int:
    """The number of threads that quantize: the recipe's, or fewer where ``--memory`` allows fewer to choose codes."""
    if quantizer == "kernel":
        return plan.recipe.threads
    return threads_within(plan.memory_bytes - PROCESS_BYTES, spec, plan.recipe.threads)


def _inputs(context: StageContext, student: Student, folder: Path, dtype: torch.dtype) -> tuple[LayerInputs, bool]:
    """Returns the inputs of the student's layers, and whether they stay after their use here, for another file."""
    taken, own = LAYER_INPUTS.within(folder), OWN_LAYER_INPUTS.within(folder)
    if student.is_original and not own.exists():
        if taken.exists():
            return LayerInputs(taken), False
        kept = context.work.path("calibrate", LAYER_INPUTS)
        if kept.exists():
            return LayerInputs(kept), True
    shutil.rmtree(taken, ignore_errors=True)  # those of the original
    return _own_inputs(context, student, own, dtype), False


def _own_inputs(context: StageContext, student: Student, folder: Path, dtype: torch.dtype) -> LayerInputs:
    """Runs the first calibration tokens through the student, unless an attempt to write the same file has done so."""
    if folder.exists():
        return LayerInputs(folder)
    use_threads(context.plan)
    tokens_BT = token_blocks(context.work).calibration
    tokens_BT = tokens_BT[: n_kept_blocks(*tokens_BT.shape)]
    model = StreamedModel(student, limit=memory_limit(context), device=torch.device(context.plan.device))
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with context.progress.bar("layers", student.spec.n_layers) as advance:
        write_layer_inputs(model, tokens_BT, unfinished, dtype, advance)
    model.release()
    flush_folder(unfinished)
    unfinished.rename(folder)
    return LayerInputs(folder)

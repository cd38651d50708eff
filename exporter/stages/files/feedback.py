"""Error feedback for a stage that writes a file, from the layer inputs of the student that it writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compressors.calibration.layer_inputs import InputsOfLayers, LayerInputs, PassingInputs, write_layer_inputs
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
    context: StageContext, student: Student, quantizer: Quantizer, folder: Path, *, by_layer: bool = False
) -> Iterator[StudentFeedback | None]:
    """The feedback of a student's matrices; None where the kernels choose the codes.

    The inputs of the original's layers are known from calibration. A student that differs first runs the same tokens
    through its own layers, and so does the original where they are gone. Inputs that lie in the folder are this file's
    alone: a layer's go as soon as the layer is on the disk. The others stay until the file is done, so that an
    interrupted attempt to write the same student there can continue.

    With ``by_layer`` no file stays that an attempt could continue: where calibration's inputs do not serve, a layer's
    are made when its codes are chosen, and nothing lies in the folder.
    """
    if quantizer == "kernel":
        yield None
        return
    dtype = dtype_of(context.plan.recipe.arithmetic)
    inputs, remove = _inputs(context, student, folder, dtype, by_layer=by_layer)
    threads = writer_threads(context.plan, student.spec, quantizer)
    moments = SecondMoments(student, inputs, dtype=dtype, threads=threads)
    tied = student.spec.tied_embeddings
    of_vocabulary = Sensitivities(context.work.path("sensitivity", SENSITIVITIES), tied).vocabulary
    gradient = EmbeddingGradient(of_vocabulary.embedding_gradient_moments, float(of_vocabulary.kappa))
    yield StudentFeedback(moments, tied=tied, gradient=gradient, remove=remove)
    for own in (LAYER_INPUTS, OWN_LAYER_INPUTS):
        shutil.rmtree(own.within(folder), ignore_errors=True)


def writer_threads(plan: Plan, spec: ModelSpec, quantizer: Quantizer) -> int:
    """The number of threads that quantize: the recipe's, or fewer where ``--memory`` allows fewer to choose codes."""
    if quantizer == "kernel":
        return plan.recipe.threads
    return threads_within(plan.memory_bytes - PROCESS_BYTES, spec, plan.recipe.threads)


def _inputs(
    context: StageContext, student: Student, folder: Path, dtype: torch.dtype, *, by_layer: bool
) -> tuple[InputsOfLayers, Callable[[int], None] | None]:
    """Returns the inputs of the student's layers, and what removes those of one; None: they stay, or pass by."""
    taken, own = LAYER_INPUTS.within(folder), OWN_LAYER_INPUTS.within(folder)
    if student.is_original and not own.exists():
        if taken.exists():
            return LayerInputs(taken), LayerInputs(taken).remove
        kept = context.work.path("calibrate", LAYER_INPUTS)
        if kept.exists():
            return LayerInputs(kept), None  # for another file
    if by_layer:
        return PassingInputs(*_model_and_tokens(context, student), dtype), None
    shutil.rmtree(taken, ignore_errors=True)  # those of the original
    inputs = _own_inputs(context, student, own, dtype)
    return inputs, inputs.remove


def _own_inputs(context: StageContext, student: Student, folder: Path, dtype: torch.dtype) -> LayerInputs:
    """Runs the first calibration tokens through the student, unless an attempt to write the same file has done so."""
    if folder.exists():
        return LayerInputs(folder)
    model, tokens_BT = _model_and_tokens(context, student)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with context.progress.bar("layers", student.spec.n_layers) as advance:
        write_layer_inputs(model, tokens_BT, unfinished, dtype, advance)
    model.release()
    flush_folder(unfinished)
    unfinished.rename(folder)
    return LayerInputs(folder)


def _model_and_tokens(context: StageContext, student: Student) -> tuple[StreamedModel, torch.Tensor]:
    """The student, ready to run, and the first calibration tokens."""
    use_threads(context.plan)
    tokens_BT = token_blocks(context.work).calibration
    model = StreamedModel(student, limit=memory_limit(context), device=torch.device(context.plan.device))
    return model, tokens_BT[: n_kept_blocks(*tokens_BT.shape)]

"""Writes the GGUF file, the folder of the ONNX model, and the student's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.file_names import ONNX_FOLDER, ORIGINAL_VALUES, STUDENT_FOLDER
from exporter.planning.recipe import FileChoice
from exporter.stages.files.feedback import feedback_for, writer_threads
from exporter.stages.inputs import importance_of, open_student
from exporter.work.stage import StageContext
from exporter.writing.gguf.metadata import gguf_file_name
from exporter.writing.gguf.writer import gguf_by_layer, predict_file_size, write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.layer_by_layer import LayerByLayer
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import onnx_by_layer, predict_size, write_onnx
from exporter.writing.tuning import keep_values

__all__ = ["gguf", "onnx", "student", "weights_by_layer", "write_gguf_file", "write_onnx_folder"]


def gguf(context: StageContext) -> None:
    """Writes the recipe's GGUF file."""
    recipe, recovered = context.plan.recipe, open_student(context.plan, context.work)
    path = write_gguf_file(context, recovered, recipe.file("gguf"), context.output)
    if recipe.recover.after_quantizing is not None:
        keep_values(GgufWeights(path, recovered.spec), recovered.spec, context.file(ORIGINAL_VALUES))


def onnx(context: StageContext) -> None:
    """Writes the recipe's graph and weights, and the files that onnxruntime-genai and optimum need beside them."""
    recipe, recovered = context.plan.recipe, open_student(context.plan, context.work)
    folder = write_onnx_folder(context, recovered, recipe.file("onnx"), context.output)
    if recipe.recover.after_quantizing is not None:
        keep_values(OnnxWeights(folder, recovered.spec), recovered.spec, context.file(ORIGINAL_VALUES))
    # onnxruntime-genai allocates a cache of max_length at once: the budget counts the recipe's context
    write_client_files(recovered, folder, max_length=recipe.budget.context)


def student(context: StageContext) -> None:
    """Writes a checkpoint that stock transformers loads: routers in float32, all else in the source's dtype."""
    recovered = open_student(context.plan, context.work)
    with context.progress.bar("layers", recovered.spec.n_layers) as advance:
        write_checkpoint(recovered, context.file(STUDENT_FOLDER), resume=True, progress=advance)


def write_gguf_file(context: StageContext, model: Student, choice: FileChoice, place: Path) -> Path:
    """Quantizes a student, weighing errors by the inputs that its matrices have on the calibration text.

    Args:
        context: the context of the stage.
        model: the student.
        choice: the types, and how their codes are chosen.
        place: the folder for the file.

    Returns:
        The file.
    """
    plan, name = context.plan, context.plan.recipe.source.model
    path = place / gguf_file_name(name, model.spec, choice.mix, choice.tensors)
    total = predict_file_size(model.spec, model.source, choice.mix, name, choice.tensors)
    with (
        feedback_for(context, model, choice.quantizer, place) as feedback,
        context.progress.bar("bytes", total) as advance,
    ):
        write_gguf(
            model,
            choice.mix,
            path,
            types=choice.tensors,
            importance=importance_of(model, plan, context.work),
            feedback=feedback,
            name=name,
            threads=writer_threads(plan, model.spec, choice.quantizer),
            resume=True,
            progress=advance,
        )
    return path


def write_onnx_folder(context: StageContext, model: Student, choice: FileChoice, place: Path) -> Path:
    """Writes graph and weights of a student, as :func:`write_gguf_file` does; returns their folder."""
    folder = ONNX_FOLDER.within(place)
    total = predict_size(model.spec, choice.mix, encodings=choice.tensors)
    with (
        feedback_for(context, model, choice.quantizer, place) as feedback,
        context.progress.bar("bytes", total) as advance,
    ):
        write_onnx(
            model,
            choice.mix,
            folder,
            encodings=choice.tensors,
            inputs=choice.inputs,
            importance=importance_of(model, context.plan, context.work),
            feedback=feedback,
            threads=writer_threads(context.plan, model.spec, choice.quantizer),
            resume=True,
            progress=advance,
        )
    return folder


@contextmanager
def weights_by_layer(
    context: StageContext, model: Student, artifact: str, choice: FileChoice, place: Path
) -> Iterator[LayerByLayer]:
    """The numbers of the file that would be written, one layer at a time; calibration's layer inputs stay.

    Args:
        context: the context of the stage.
        model: the student.
        artifact: gguf or onnx.
        choice: the types, and how their codes are chosen.
        place: an empty folder.
    """
    importance = importance_of(model, context.plan, context.work)
    threads = writer_threads(context.plan, model.spec, choice.quantizer)
    folder = place / "layers"
    folder.mkdir()
    with feedback_for(context, model, choice.quantizer, place, by_layer=True) as feedback:
        if artifact == "gguf":
            yield gguf_by_layer(
                model,
                choice.mix,
                folder,
                types=choice.tensors,
                importance=importance,
                feedback=feedback,
                threads=threads,
            )
        else:
            yield onnx_by_layer(
                model,
                choice.mix,
                folder,
                encodings=choice.tensors,
                inputs=choice.inputs,
                importance=importance,
                feedback=feedback,
                threads=threads,
            )

"""The disk that the inputs of layers take beside the file that uses them up: a layer's go when the layer is written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from compressors.calibration.sizes import layer_input_bytes
from compressors.model.description.spec import ModelSpec
from exporter.planning.recipe import FileChoice
from exporter.writing.gguf.layout import plan_tensors as gguf_tensors
from exporter.writing.onnx.layout import plan_tensors as onnx_tensors

__all__ = ["inputs_beside_file"]


def inputs_beside_file(artifact: str, spec: ModelSpec, choice: FileChoice, n_tokens: int) -> int:
    """The bytes that writing a file needs beyond the whole file, at the moment when file and inputs take most together.

    Args:
        artifact: gguf or onnx.
        spec: the student.
        choice: the types of the file.
        n_tokens: the tokens whose inputs are kept.
    """
    all_inputs = layer_input_bytes(spec, n_tokens)
    of_layer = all_inputs // (spec.n_layers + 1)
    groups = list(_layers_in_turn(artifact, spec, choice))
    last = {layer: number for number, (layer, _) in enumerate(groups)}
    written, left, most = 0, all_inputs, all_inputs
    for number, (layer, n_bytes) in enumerate(groups):
        written += n_bytes
        most = max(most, written + left)
        if last[layer] == number and (layer is None or layer < spec.n_layers):
            left -= of_layer
    return most - written


def _layers_in_turn(artifact: str, spec: ModelSpec, choice: FileChoice) -> Iterator[tuple[int | None, int]]:
    """Yields the layers in the file's order, None for what is outside of layers, each with its bytes."""
    if artifact == "gguf":
        tensors = gguf_tensors(spec, choice.mix, choice.tensors)
        sizes = [(tensor.layer, tensor.n_bytes) for tensor in tensors]
    else:
        weights = onnx_tensors(spec, choice.mix, choice.tensors).weights
        sizes = [(weight.layer, sum(tensor.n_bytes for tensor in weight.tensors)) for weight in weights]
    for layer, of_layer in groupby(sizes, key=lambda size: size[0]):
        yield layer, sum(n_bytes for _, n_bytes in of_layer)

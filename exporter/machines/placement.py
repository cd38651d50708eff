"""Shares a file between a graphics card and the computer's memory, as llama-server's options do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from exporter.estimating.prediction import Prediction
from exporter.machines.known import Machine
from exporter.writing.gguf.layout import PlannedTensor
from exporter.writing.gguf.type_table import weights_of_a_token

__all__ = ["Placement", "placed"]

_ON_THE_CARD = ("-ngl", "999")  # more layers than any model has


@dataclass(frozen=True)
class Placement:
    """Where the parts of a file lie, and how fast a token can be made there.

    Attributes:
        options: llama-server's options that put them there.
        tokens_per_second: the most tokens that the memories' bandwidths allow, with an empty cache.
    """

    options: Sequence[str]
    tokens_per_second: float


def placed(
    spec: ModelSpec, tensors: Sequence[PlannedTensor], prediction: Prediction, machine: Machine
) -> Placement | None:
    """Puts a file's tensors where the machine has room for them; None if whole layers of experts do not divide so.

    A card beside a computer's memory holds everything but the embedding, of which a token needs a row, and the experts
    of the first layers (``-ncmoe``), of as few as possible. An embedding that is the head too lies in both
    (``TENSOR_DUPLICATED`` in ``src/llama-model-loader.h``).

    Args:
        spec: the student.
        tensors: all tensors of its GGUF file.
        prediction: the file's needs at run time.
        machine: the machine.
    """
    if machine.card is None or machine.ram is None:
        memory = machine.card or machine.ram
        assert memory is not None, "a machine has memory"
        read = sum(_bytes_of_a_token(spec, tensor) for tensor in tensors)
        return Placement(_ON_THE_CARD if machine.card else (), memory.bandwidth / read)
    beside = prediction.kv_cache + prediction.compute
    embedding = sum(tensor.n_bytes for tensor in tensors if tensor.role is Role.TOKEN_EMBEDDING)
    for n_layers in range(spec.n_layers + 1):
        in_ram = [tensor for tensor in tensors if _is_of_first_layers(tensor, n_layers)]
        on_card = [tensor for tensor in tensors if _is_on_card(tensor, spec, n_layers)]
        if sum(tensor.n_bytes for tensor in on_card) + beside > machine.card.bytes:
            continue
        if sum(tensor.n_bytes for tensor in in_ram) + embedding + prediction.reserve > machine.ram.bytes:
            return None
        seconds = sum(
            _bytes_of_a_token(spec, tensor) / memory.bandwidth
            for memory, held in ((machine.card, on_card), (machine.ram, in_ram))
            for tensor in held
        )
        return Placement((*_ON_THE_CARD, *(("-ncmoe", str(n_layers)) if n_layers else ())), 1 / seconds)
    return None


def _is_of_first_layers(tensor: PlannedTensor, n_layers: int) -> bool:
    """True for experts of the first ``n_layers`` layers."""
    return tensor.layer is not None and tensor.role.is_expert and tensor.layer < n_layers


def _is_on_card(tensor: PlannedTensor, spec: ModelSpec, n_layers: int) -> bool:
    """True if the card holds the tensor when the experts of the first ``n_layers`` layers are left to the computer."""
    if tensor.role is Role.TOKEN_EMBEDDING:
        return spec.tied_embeddings
    return not _is_of_first_layers(tensor, n_layers)


def _bytes_of_a_token(spec: ModelSpec, tensor: PlannedTensor) -> float:
    """Bytes of a tensor that are read for each token, on average."""
    return tensor.n_bytes * weights_of_a_token(spec, tensor) / tensor.n_values

"""Writes checkpoints with the shape of published models and random weights, one tensor in memory at a time.

    python -m benchmarks.scale.checkpoints olmoe|qwen3-30b FOLDER [--layers N] [--sparse]

Weights are normal with the models' own initial standard deviation; routers such that logits have a standard deviation
of about 1. Embeddings are large enough to be found again behind the last layer, and a row of the head resembles the
embedding of the token before it, some rows more than others. So most tokens have a successor that stands out, as in
trained models: without that, every second token would be a tie between thousands, which a quantized file decides
otherwise. The tokenizer is the bundled model's, whose token ids exist in every larger vocabulary.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError
from exporter.estimating.sizes import format_size
from exporter.hub import resolve_model

__all__ = ["MODELS", "with_layers", "write_checkpoint"]

_COMMON: Mapping[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 0,  # the bundled tokenizer's, not the published model's
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/allenai/OLMoE-1B-7B-0924: 6.9 billion parameters
    "olmoe": {
        **_COMMON,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "vocab_size": 50304,
    },
    # https://huggingface.co/Qwen/Qwen3-30B-A3B: 30.5 billion parameters
    "qwen3-30b": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
"""Their ``config.json``, as far as it matters."""

_BYTES_PER_VALUE = 2  # bfloat16
_POOL_VALUES = 67_108_859  # a prime: rows of no length repeat in step with it, and no two tensors start alike
_POOL_STEP = 7_654_321
_EMBEDDING_PLACE = 0  # in the pool, as those that tensors have
_EMBEDDING_SCALE = 100  # of an embedding's values in relation to other weights
_HEAD_SCALE = 0.5  # of the random part of the head
_SUCCESSOR_SHARES = (0.0, 0.01)  # of a token's embedding in the head's next row; each row draws one
_ROWS_OF_A_PIECE = 1024
_ALIGNMENT = 8  # of the data behind a safetensors header


@dataclass(frozen=True)
class _Tensor:
    name: str
    role: Role
    shape: tuple[int, ...]
    index: int  # among all tensors of the model

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * _BYTES_PER_VALUE


def write_checkpoint(
    config: Mapping[str, Any], folder: Path, *, shard_bytes: int = 4_000_000_000, sparse: bool = False
) -> None:
    """Writes a checkpoint of this configuration: bfloat16 shards with an index, one tensor per expert.

    Equal arguments give equal bytes. The folder is complete or absent.

    Args:
        config: what ``config.json`` says, such as a value of :data:`MODELS`.
        folder: is made; must not exist.
        shard_bytes: most bytes of tensors in one file, unless one tensor is larger.
        sparse: weights are holes that read as zeros and take no disk: only headers are real.

    Raises:
        InputError: the folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: choose another folder, or remove it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve_model(None) / name, partial / name)
    spec = read_spec(partial)
    shards = _shards(_tensors(spec), shard_bytes)
    values = None if sparse else _Values(spec.hidden_size)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(partial / name, tensors, values)
        weight_map.update(dict.fromkeys((tensor.name for tensor in tensors), name))
    total = sum(tensor.n_bytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    partial.rename(folder)


def with_layers(config: Mapping[str, Any], n_layers: int | None) -> Mapping[str, Any]:
    """The configuration with another number of decoder layers; None keeps it."""
    return config if n_layers is None else {**config, "num_hidden_layers": n_layers}


def _tensors(spec: ModelSpec) -> Iterator[_Tensor]:
    places: list[tuple[TensorSpec, int | None, int | None]] = [(tensor, None, None) for tensor in spec.tensors]
    for index, layer in enumerate(spec.layers):
        places += [(tensor, index, None) for tensor in layer.shared_tensors]
        places += [(tensor, index, expert) for expert in range(layer.n_experts) for tensor in layer.expert_tensors]
    for number, (tensor, layer_index, expert_index) in enumerate(places):
        name = tensor.name.format(layer=layer_index, expert=expert_index)
        yield _Tensor(name, tensor.role, spec.dimensions(tensor.role, layer_index), number)


def _shards(tensors: Iterator[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if shards[-1] and n_bytes + tensor.n_bytes > shard_bytes:
            shards.append([])
            n_bytes = 0
        shards[-1].append(tensor)
        n_bytes += tensor.n_bytes
    return shards


class _Values:
    """Random bfloat16 values as uint16: tensors are slices of one pool, each from a place of its own."""

    def __init__(self, hidden_size: int) -> None:
        generator = np.random.default_rng(0)
        self._pool = _bfloat16(generator.standard_normal(_POOL_VALUES, dtype=np.float32) * np.float32(0.02))
        self._hidden_size = hidden_size
        self._generator = generator

    def of(self, tensor: _Tensor) -> Iterator[npt.NDArray[np.uint16]]:
        """The values in order, in pieces."""
        n_values = prod(tensor.shape)
        if "norm" in tensor.role.value:
            yield _bfloat16(np.ones(n_values, dtype=np.float32))
        elif tensor.role is Role.ROUTER:
            scale = self._hidden_size**-0.5  # the router sees normed values, of mean square 1
            yield _bfloat16(self._generator.standard_normal(n_values, dtype=np.float32) * scale)
        elif tensor.role is Role.TOKEN_EMBEDDING:
            for rows in _pieces(tensor.shape[0]):
                yield _bfloat16(self._embeddings(rows))
        elif tensor.role is Role.HEAD:
            shares_V1 = np.random.default_rng(1).uniform(*_SUCCESSOR_SHARES, (tensor.shape[0], 1)).astype(np.float32)
            for rows in _pieces(tensor.shape[0]):
                before_nD = self._embeddings(range(rows.start - 1, rows.stop - 1))
                yield _bfloat16(
                    _HEAD_SCALE * self._rows(tensor.index, rows) + shares_V1[rows.start : rows.stop] * before_nD
                )
        else:
            start = tensor.index * _POOL_STEP % _POOL_VALUES
            while n_values:
                piece = self._pool[start : start + n_values]
                yield piece
                n_values, start = n_values - len(piece), 0

    def _embeddings(self, tokens: range) -> npt.NDArray[np.float32]:
        """The embeddings of these tokens, [n, D]."""
        return _EMBEDDING_SCALE * self._rows(_EMBEDDING_PLACE, tokens)

    def _rows(self, place: int, rows: range) -> npt.NDArray[np.float32]:
        """Rows of a matrix that begins at a place of the pool, [n, D]."""
        values = place * _POOL_STEP + np.arange(rows.start * self._hidden_size, rows.stop * self._hidden_size)
        bits = self._pool[values % _POOL_VALUES].astype(np.uint32) << 16
        return bits.view(np.float32).reshape(len(rows), self._hidden_size)


def _pieces(n_rows: int) -> Iterator[range]:
    for start in range(0, n_rows, _ROWS_OF_A_PIECE):
        yield range(start, min(start + _ROWS_OF_A_PIECE, n_rows))


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits: npt.NDArray[np.uint16] = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    return bits


def _write_shard(file: Path, tensors: Sequence[_Tensor], values: _Values | None) -> None:
    """The safetensors format: 8 bytes of header length, the header as JSON, the tensors' bytes; None leaves a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.n_bytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if values is None:
            stream.truncate(stream.tell() + end)
            return
        for tensor in tensors:
            for piece in values.of(tensor):
                stream.write(piece.data)


@click.command()
@click.argument("model", type=click.Choice(sorted(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers.  [default: as published]")
@click.option("--sparse", is_flag=True, help="Real headers, and holes in place of the weights.")
def main(model: str, folder: Path, layers: int | None, sparse: bool) -> None:
    """Write a checkpoint of MODEL's shape into FOLDER."""
    start = time.monotonic()
    try:
        write_checkpoint(with_layers(MODELS[model], layers), folder, sparse=sparse)
    except InputError as error:
        raise click.ClickException(str(error)) from None
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    click.echo(f"{folder}: {format_size(n_bytes)} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""The files beside ``model.onnx`` that onnxruntime-genai and optimum's ORTModelForCausalLM look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.config.special_tokens import SpecialTokens, configured_tokens, special_tokens
from compressors.model.description.mixers import ShortConvolution
from compressors.model.description.onnx_cache import Attention, cache_heads
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.files.json_file import read_json
from compressors.model.files.onnx_names import CACHED, STATES, cache_input, cache_output
from compressors.model.sources.student import Student
from exporter.writing.files import write_atomically
from exporter.writing.onnx.layout import MODEL_FILE
from exporter.writing.tokenizer_copy import write_tokenizer
from validate.runtimes.cost import CHUNK_TOKENS

__all__ = ["write_client_files"]


def write_client_files(student: Student, folder: Path, *, max_length: int | None = None) -> None:
    """Writes ``config.json``, ``generation_config.json``, ``genai_config.json`` and the tokenizer.

    Args:
        student: the model that ``folder`` holds.
        folder: the folder with ``model.onnx``.
        max_length: tokens of KV cache that onnxruntime-genai allocates by default; None: the context.

    Raises:
        InputError: the model's tokenizer cannot be used.
    """
    spec, source = student.spec, student.source
    special = special_tokens(source.tokenizer_folder, spec.vocab_size)
    write_tokenizer(source.tokenizer_folder, folder)
    _write_json(folder / "config.json", _model_config(spec, source.config))
    generation = _generation_config(source.tokenizer_folder, spec.vocab_size, special)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "genai_config.json", _genai_config(spec, special, max_length or spec.context_length))


def _model_config(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's ``config.json`` with the student's numbers.

    transformers 4 reads ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, transformers 5 ``rope_parameters`` and
    ``dtype``: both are there. The graph has no window: it is written for a context within the window.
    """
    written = spec.written.family.edited(spec.written, config)
    windows = {"sliding_window": None, "use_sliding_window": False} if spec.window is not None else {}
    return (
        written
        | windows
        | (_rotary(spec.ropes[0]) if len(spec.ropes) == 1 else {})  # of several, the source has one for each kind
        | {
            "num_hidden_layers": spec.n_layers,
            "max_position_embeddings": spec.context_length,
            "dtype": "float32",
            "torch_dtype": "float32",
            "use_cache": True,
        }
    )


def _rotary(rope: Rope) -> dict[str, Any]:
    values = rope.in_config()
    scaling = None if rope.kind is RopeKind.DEFAULT else values
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": values}


def _generation_config(folder: Path, vocab_size: int, special: SpecialTokens) -> dict[str, Any]:
    """The source's generation config, completed with every end token; or the special tokens if it has none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {"_from_model_config": True, **_described(special)}
    config: dict[str, Any] = read_json(path)
    configured = configured_tokens(folder, vocab_size)
    if special.ends != configured.ends or configured.without_row or config.get("eos_token_id") is None:
        config |= {key: value for key, value in _described(special).items() if key == "eos_token_id"}
    return config


def _described(special: SpecialTokens) -> dict[str, Any]:
    """Ids of begin, end and padding. Ids that the model lacks are left out, except padding, which batches need."""
    end: int | list[int] | None = list(special.ends) or None
    if len(special.ends) == 1:
        end = special.ends[0]
    padding = special.ends[0] if special.pad is None and special.ends else special.pad
    tokens = {"bos_token_id": special.bos, "eos_token_id": end, "pad_token_id": padding}
    return {name: value for name, value in tokens.items() if value is not None}


def _genai_config(spec: ModelSpec, special: SpecialTokens, max_length: int) -> dict[str, Any]:
    """``genai_config.json`` of onnxruntime-genai (``src/config.h``); type ``decoder`` is its plain decoder pipeline.

    Key-value heads are those of the graph's caches, in the first layer; where others differ, the graph's inputs say so.
    Of states, which have a type of their own, the names follow from those of the keys
    (``src/models/recurrent_state.cpp``).
    """
    attention = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention))
    heads = cache_heads(attention)
    key, value = CACHED
    return {
        "model": {
            "type": _type(spec),
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_length,
            **_described(special),
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"provider_options": []},
                "hidden_size": spec.hidden_size,
                "head_size": heads.width,
                "num_attention_heads": attention.n_heads,
                "num_key_value_heads": heads.number,
                "num_hidden_layers": spec.n_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": cache_input("%d", key),
                    "past_value_names": cache_input("%d", value),
                    **_of_convolutions(spec, {"past_conv_names": cache_input("%d", STATES[0])}),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": cache_output("%d", key),
                    "present_value_names": cache_output("%d", value),
                    **_of_convolutions(spec, {"present_conv_names": cache_output("%d", STATES[0])}),
                },
                **_of_convolutions(spec, {"layer_types": _kinds_of_caches(spec)}),
            },
        },
        "search": {
            "do_sample": False,
            "max_length": max_length,
            "chunk_size": CHUNK_TOKENS,
            "past_present_share_buffer": True,
        },
    }


def _type(spec: ModelSpec) -> str:
    """The type of decoder, which decides the caches that it can keep."""
    if _has_short_convolutions(spec):
        return "lfm2"
    return "qwen3_5_moe_text" if any(layer.mixer.is_recurrent for layer in spec.layers) else "decoder"


def _has_short_convolutions(spec: ModelSpec) -> bool:
    return any(isinstance(layer.mixer, ShortConvolution) for layer in spec.layers)


def _of_convolutions(spec: ModelSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that only models with short convolutions have (``src/models/cache/conv_kv_cache.cpp``)."""
    return settings if _has_short_convolutions(spec) else {}


def _kinds_of_caches(spec: ModelSpec) -> list[str]:
    """Any other name than the first one stands for a layer that keeps its convolution's last inputs."""
    return ["conv" if layer.mixer.is_recurrent else "full_attention" for layer in spec.layers]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")

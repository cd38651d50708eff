"""The files beside ``model.onnx`` that onnxruntime-genai and optimum's ORTModelForCausalLM look for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compressors.model.rope import RopeKind
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from exporter.files import write_atomically
from exporter.onnx.layout import MODEL_FILE
from exporter.onnx.memory import CHUNK_TOKENS
from exporter.onnx.writer import with_context

__all__ = ["write_client_files"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_client_files(
    student: Student, folder: Path, *, context_length: int | None = None, max_length: int | None = None
) -> None:
    """Writes ``config.json``, ``generation_config.json`` and ``genai_config.json`` and copies the tokenizer.

    Args:
        student: the model that ``folder`` holds.
        folder: where ``model.onnx`` lies.
        context_length: as it was given to :func:`exporter.onnx.writer.write_onnx`.
        max_length: tokens of KV cache that onnxruntime-genai allocates unless it is told otherwise; None: the context.

    Raises:
        InputError: the context does not fit the model.
    """
    shape = with_context(student.shape, context_length)
    source = student.source.folder
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _write_json(folder / "config.json", _model_config(shape, source / "config.json"))
    _write_json(folder / "generation_config.json", _generation_config(shape, source / "generation_config.json"))
    _write_json(folder / "genai_config.json", _genai_config(shape, max_length or shape.context_length))


def _model_config(shape: MoeShape, source: Path) -> dict[str, Any]:
    """The source's ``config.json`` with the student's numbers.

    transformers 4 reads ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, transformers 5 ``rope_parameters`` and
    ``dtype``: both are there. The graph knows no window: it is written for a context within it.
    """
    config: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    rope = shape.rope.in_config()
    windows = {"sliding_window": None, "use_sliding_window": False} if shape.window is not None else {}
    return (
        shape.in_config(config)
        | windows
        | {
            "num_hidden_layers": shape.n_layers,
            "max_position_embeddings": shape.context_length,
            "rope_theta": shape.rope_theta,
            "rope_scaling": None if shape.rope.kind is RopeKind.DEFAULT else rope,
            "rope_parameters": rope,
            "dtype": "float32",
            "torch_dtype": "float32",
            "use_cache": True,
        }
    )


def _generation_config(shape: MoeShape, source: Path) -> dict[str, Any]:
    """The source's own, or the special tokens if it has none."""
    if source.is_file():
        config: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        return config
    return {"_from_model_config": True, **_special_tokens(shape)}


def _special_tokens(shape: MoeShape) -> dict[str, Any]:
    """Ids of begin, end and padding; what the model does not have is left out."""
    end: int | list[int] | None = list(shape.eos_token_ids) or None
    if len(shape.eos_token_ids) == 1:
        end = shape.eos_token_ids[0]
    padding = shape.pad_token_id if shape.pad_token_id is not None or end is None else shape.eos_token_ids[0]
    tokens = {"bos_token_id": shape.bos_token_id, "eos_token_id": end, "pad_token_id": padding}
    return {name: value for name, value in tokens.items() if value is not None}


def _genai_config(shape: MoeShape, max_length: int) -> dict[str, Any]:
    """``genai_config.json`` of onnxruntime-genai (``src/config.h``); type ``decoder`` is its plain decoder pipeline."""
    return {
        "model": {
            "type": "decoder",
            "vocab_size": shape.vocab_size,
            "context_length": shape.context_length,
            **_special_tokens(shape),
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"provider_options": []},
                "hidden_size": shape.hidden_size,
                "head_size": shape.head_dim,
                "num_attention_heads": shape.n_heads,
                "num_key_value_heads": shape.n_kv_heads,
                "num_hidden_layers": shape.n_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": max_length,
            "chunk_size": CHUNK_TOKENS,
            "past_present_share_buffer": True,
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")

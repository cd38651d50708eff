"""Damage to an ONNX folder: attributes of the graph, its tables, and the configurations and tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

__all__ = ["FolderDamage", "configuration_damages", "graph_damages", "tokenizer_file_damages"]


@dataclass(frozen=True)
class FolderDamage:
    """A change to a copy of the folder, and what its symptom must name."""

    what: str
    names: tuple[str, ...]
    apply: Callable[[Path], None]


_ATTRIBUTES: tuple[tuple[str, str, Any], ...] = (
    *(
        (kind, "epsilon", value)
        for kind in ("RMSNormalization", "SkipSimplifiedLayerNormalization")
        for value in (1e-5, 1.05e-6)
    ),
    ("RMSNormalization", "axis", 0),
    ("GroupQueryAttention", "scale", 1.0),
    ("GroupQueryAttention", "scale", 0.18),
    ("GroupQueryAttention", "num_heads", 4),
    ("GroupQueryAttention", "kv_num_heads", 8),
    ("GroupQueryAttention", "do_rotary", 0),
    ("GroupQueryAttention", "rotary_interleaved", 1),
    ("GroupQueryAttention", "softcap", 50.0),
    ("GroupQueryAttention", "local_window_size", 128),
    ("GroupQueryAttention", "smooth_softmax", 1),
    *(
        (kind, name, value)
        for kind in ("MoE", "QMoE")
        for name, value in (
            ("k", 3),
            ("k", 1),
            ("normalize_routing_weights", 0),
            ("activation_type", "gelu"),
            ("activation_alpha", 1.702),
            ("activation_beta", 1.0),
            ("swiglu_limit", 7.0),
            ("swiglu_fusion", 0),
            ("use_sparse_mixer", 1),
        )
    ),
    ("QMoE", "block_size", 64),
    ("QMoE", "expert_weight_bits", 8),
    ("QMoE", "weights_prepacked", 1),
    ("MatMulNBits", "bits", 4),  # of the head, which has 8
    ("MatMulNBits", "block_size", 64),
    ("MatMulNBits", "N", 64),
    ("MatMulNBits", "K", 512),
    ("GatherBlockQuantized", "bits", 4),
    ("GatherBlockQuantized", "block_size", 64),
    ("GatherBlockQuantized", "gather_axis", 1),
    ("GatherBlockQuantized", "quantize_axis", 0),
    ("FusedMatMul", "transB", 0),
    ("FusedMatMul", "transA", 1),
    ("FusedMatMul", "alpha", 1.05),
    ("ArgMax", "axis", 0),
    ("ArgMax", "keepdims", 1),
    ("ArgMax", "select_last_index", 1),
    ("ReduceSum", "keepdims", 1),
    ("Shape", "start", 0),
    ("Concat", "axis", 1),
    ("Cast", "to", onnx.TensorProto.DOUBLE),
    ("Gather", "axis", 1),
)


def graph_damages(folder: Path) -> Iterator[FolderDamage]:
    """Yields damages of attributes of the graph's operators, of constants, and of rotary tables."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    for kind, name, value in _ATTRIBUTES:
        if kind in kinds:
            yield FolderDamage(
                f"{kind} {name} = {value}", (f"{kind} {name}", f"{kind}/{name}"), _attribute(kind, name, value)
            )
    for name in ("bias.removed", "zero", "one", "axis.1"):
        yield FolderDamage(f"constant {name}", (f"constant {name}",), _constant(name))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in ("rotary.cosine", "rotary.sine"):
        for how, change in _TABLES.items():
            yield FolderDamage(f"table {name}: {how}", (name, "rope base"), _table(weights[name], change))


def _zeroed(table: Any) -> None:
    table[:] = 0


def _scaled(table: Any) -> None:
    table *= 1.05


def _one_value(table: Any) -> None:
    table[100, 3] = 0.5


def _shifted(table: Any) -> None:
    table[1:] = table[:-1].copy()


_TABLES: dict[str, Callable[[Any], None]] = {
    "zero": _zeroed,
    "x 1.05": _scaled,
    "one value": _one_value,
    "a position late": _shifted,
}


def _attribute(kind: str, name: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        node = next(node for node in reversed(model.graph.node) if node.op_type == kind)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
        onnx.save(model, folder / "model.onnx")

    return apply


def _constant(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((values + 1 if values.dtype != np.float32 else values * 0), name))
        onnx.save(model, folder / "model.onnx")

    return apply


def _table(tensor: onnx.TensorProto, change: Callable[[Any], None]) -> Callable[[Path], None]:
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")

    def apply(folder: Path) -> None:
        table = np.memmap(folder / "model.onnx.data", np.float32, "r+", offset, tuple(tensor.dims))
        change(table)
        table.flush()

    return apply


def configuration_damages(folder: Path) -> Iterator[FolderDamage]:
    """Yields damages of every value of genai_config.json, and of the numbers in the other two configurations."""
    genai = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    for place, value in _leaves(genai):
        if place[-1] in ("past_present_share_buffer", "chunk_size", "type"):
            continue  # how memory is used, and the one pipeline that there is for us
        yield _edit("genai_config.json", place, _other(value))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        yield _edit("config.json", (name,), 7)
    for name, value in (
        ("head_dim", 16),
        ("rms_norm_eps", 1e-5),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("max_position_embeddings", 1 << 20),
        ("tie_word_embeddings", False),
        ("hidden_act", "gelu"),
        ("bos_token_id", 7),
        ("eos_token_id", 7),
        ("pad_token_id", 7),
        ("num_experts_per_tok", 2),
        ("num_experts", 4),
        ("moe_intermediate_size", 64),
        ("norm_topk_prob", False),
        ("model_type", "mixtral"),
    ):
        yield _edit("config.json", (name,), value)
    for name, value in (("eos_token_id", 7), ("bos_token_id", 7), ("pad_token_id", 7), ("temperature", 0.1)):
        yield _edit("generation_config.json", (name,), value)


def tokenizer_file_damages(folder: Path) -> Iterator[FolderDamage]:
    """Yields damages of tokenizer.json and tokenizer_config.json."""

    def tokenizer(what: str, change: Callable[[dict[str, Any]], None]) -> FolderDamage:
        def apply(target: Path) -> None:
            path = target / "tokenizer.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.write_text(json.dumps(content), encoding="utf-8")

        return FolderDamage(f"tokenizer.json: {what}", ("tokenizer",), apply)

    def exchange(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        one, other = [text for text, number in vocabulary.items() if number in (400, 401)]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    yield tokenizer("two tokens exchanged", exchange)
    yield tokenizer("merges reversed", lambda content: content["model"]["merges"].reverse())
    yield tokenizer("one merge dropped", lambda content: content["model"]["merges"].pop(100))
    yield tokenizer(
        "every second merge dropped", lambda content: content["model"]["merges"].__delitem__(slice(0, None, 2))
    )
    yield tokenizer("normalizer dropped", lambda content: content.update(normalizer=None))
    yield tokenizer("pre-tokenizer of GPT-2", lambda content: content.update(pre_tokenizer=_GPT2))
    yield tokenizer("a special token dropped", lambda content: content["added_tokens"].pop())
    yield tokenizer("a special token strips", lambda content: content["added_tokens"][1].update(lstrip=True))
    yield tokenizer("a special token is not special", lambda content: content["added_tokens"][1].update(special=False))
    for name, value in (
        ("eos_token", "<|im_end|>"),
        ("pad_token", "<|im_end|>"),
        ("bos_token", "<|im_start|>"),
        ("unk_token", "<|im_end|>"),
        ("chat_template", "{{ messages }}"),
        ("chat_template", None),
        ("model_max_length", 128),
    ):
        yield _edit("tokenizer_config.json", (name,), value, ("tokenizer",))


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _leaves(data: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*place, key))
        elif key != "provider_options":
            yield (*place, key), value


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return f"{value}x" if isinstance(value, str) else None


def _edit(file: str, place: tuple[str, ...], value: Any, names: tuple[str, ...] = ()) -> FolderDamage:
    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8"))
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if value is None:
            inner.pop(place[-1], None)
        else:
            inner[place[-1]] = value
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")

    shown = "missing" if value is None else f"= {value!r}"
    return FolderDamage(f"{file}: {'.'.join(place)} {shown}", names or (place[-1], f"{file} cannot"), apply)

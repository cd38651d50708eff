"""Damage to a GGUF file's key-values: every key that llama.cpp reads, wrong, missing or one too many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from gguf.constants import GGUFValueType

from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared.parts import grouped_query
from exporter.writing.gguf.container import (
    TensorEntry,
    Value,
    boolean,
    float32,
    float32_array,
    int32_array,
    render_header,
    render_values,
    string,
    string_array,
    uint32,
)

__all__ = ["MetadataDamage", "key_values", "metadata_damages", "rewrite", "tokenizer_damages"]

Changes = Mapping[str, Value | None]  # None: the key is left out


@dataclass(frozen=True)
class MetadataDamage:
    """A change to the key-values, and what its symptom must name."""

    what: str
    names: tuple[str, ...]
    changes: Changes


def rewrite(source: Path, target: Path, changes: Changes) -> None:
    """Copies a GGUF file with other key-values."""
    reader = GGUFReader(source)
    values = key_values(reader)
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    entries = [
        TensorEntry(tensor.name, tuple(reversed(tensor.shape.tolist())), tensor.tensor_type, int(tensor.n_bytes))
        for tensor in reader.tensors
    ]
    data = source.read_bytes()[reader.data_offset :]
    target.write_bytes(render_header(len(values), render_values(values), entries) + data)


def key_values(reader: GGUFReader) -> dict[str, Value]:
    """A file's key-values, to be written again."""
    return {
        key: _value(field.types, field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def _value(types: list[GGUFValueType], content: Any) -> Value:
    plain = {
        GGUFValueType.UINT32: uint32,
        GGUFValueType.FLOAT32: float32,
        GGUFValueType.STRING: string,
        GGUFValueType.BOOL: boolean,
    }
    if types[0] is not GGUFValueType.ARRAY:
        return plain[types[0]](content)
    kinds = {
        GGUFValueType.STRING: string_array,
        GGUFValueType.INT32: int32_array,
        GGUFValueType.FLOAT32: float32_array,
    }
    return kinds[types[-1]](content)


def metadata_damages(spec: ModelSpec) -> Iterator[MetadataDamage]:
    """Yields damages of the architecture's keys."""
    prefix, attention = spec.written.family.gguf.architecture, grouped_query(spec)
    normalizes = any(layer.routed is not None and layer.routed.routing.normalizes for layer in spec.layers)
    wrong: dict[str, list[Value | None]] = {
        "block_count": [uint32(spec.n_layers + 1), None],
        "context_length": [uint32(spec.context_length // 2), None],
        "embedding_length": [uint32(spec.hidden_size * 2), None],
        "expert_feed_forward_length": [uint32(spec.expert_width // 2), None],
        "attention.head_count": [uint32(attention.n_heads // 2), None],
        "attention.head_count_kv": [uint32(attention.n_heads), uint32(1), None],
        "attention.key_length": [uint32(attention.head_dim * 2), uint32(attention.head_dim // 2)],
        "attention.value_length": [uint32(attention.head_dim * 2), uint32(attention.head_dim // 2)],
        "attention.layer_norm_rms_epsilon": [float32(spec.rms_norm_eps * 1.05), float32(1e-5), float32(0.0), None],
        "rope.freq_base": [float32(1e6), float32(spec.rope.theta * 1.01), float32(0.0)],
        "rope.dimension_count": [uint32(attention.head_dim // 2), uint32(attention.head_dim * 2)],
        "expert_count": [uint32(spec.n_experts - 1), uint32(spec.n_experts * 2), None],
        "expert_used_count": [uint32(spec.top_k - 1), uint32(spec.top_k + 1), None],
        "vocab_size": [uint32(spec.vocab_size - 1)],
        "attention.scale": [float32(1.0)],
        "attention.sliding_window": [uint32(128)],
        "attention.causal": [boolean(False)],
        "attention.clamp_kqv": [float32(1.0)],
        "attention.max_alibi_bias": [float32(8.0)],
        "attn_logit_softcapping": [float32(50.0)],
        "final_logit_softcapping": [float32(30.0)],
        "logit_scale": [float32(0.5)],
        "residual_scale": [float32(0.5)],
        "embedding_scale": [float32(2.0)],
        "expert_weights_scale": [float32(2.5)],
        "expert_weights_norm": [boolean(not normalizes)],
        "expert_gating_func": [uint32(2)],
        "expert_group_count": [uint32(4)],
        "expert_group_used_count": [uint32(2)],
        "expert_shared_count": [uint32(1)],
        "leading_dense_block_count": [uint32(1)],
        "rope.scaling.type": [string("linear"), string("yarn")],
        "rope.scaling.factor": [float32(4.0)],
        "rope.scaling.attn_factor": [float32(0.5)],
        "rope.scale_linear": [float32(2.0)],
        "pooling_type": [uint32(1)],
    }
    for key, values in wrong.items():
        for number, value in enumerate(values):
            how = "missing" if value is None else f"wrong ({number + 1})"
            names = (key, "epsilon", "rope base", "per token", "llama.cpp") if value is None else (key,)
            if key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_used_count"):
                names = ("epsilon of the norms", "rope base", "experts per token")
            yield MetadataDamage(f"{prefix}.{key} {how}", names, {f"{prefix}.{key}": value})
    both = {f"{prefix}.rope.scaling.type": string("yarn"), f"{prefix}.rope.scaling.factor": float32(4.0)}
    yield MetadataDamage(f"{prefix}.rope.scaling.type and factor", ("rope.scaling",), both)
    yield MetadataDamage("general.architecture", ("general.architecture",), {"general.architecture": string("olmoe")})


def tokenizer_damages(path: Path) -> Iterator[MetadataDamage]:
    """Yields damages of the tokenizer's keys of a file."""
    fields = GGUFReader(path).fields
    content: dict[str, Any] = {
        key.removeprefix("tokenizer.ggml."): field.contents()
        for key, field in fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    says = ("tokenizer", "vocabulary")

    def one(what: str, key: str, value: Value | None) -> MetadataDamage:
        return MetadataDamage(f"tokenizer: {what}", says, {f"tokenizer.ggml.{key}": value})

    yield from _token_damages(content, one)
    for key in ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id", "eot_token_id"):
        for token in (7, 1, 300) if key != "unknown_token_id" or key in content else (300,):
            if content.get(key) != token:
                yield one(f"{key} = {token}", key, uint32(token))
        if key in content:
            yield one(f"{key} missing", key, None)
    for key in ("add_bos_token", "add_eos_token"):
        yield one(f"{key} inverted", key, boolean(not content.get(key, False)))
    yield MetadataDamage(
        "tokenizer: chat template changed",
        says,
        {"tokenizer.chat_template": string("{% for m in messages %}{{ m.content }}\n{% endfor %}")},
    )
    yield MetadataDamage("tokenizer: chat template missing", says, {"tokenizer.chat_template": None})


def _token_damages(content: Mapping[str, Any], one: Any) -> Iterator[MetadataDamage]:
    tokens, types = list(content["tokens"]), list(content["token_type"])
    exchanged = [*tokens]
    exchanged[400], exchanged[401] = exchanged[401], exchanged[400]
    yield one("two tokens exchanged", "tokens", string_array(exchanged))
    yield one("one token is another text", "tokens", string_array([*tokens[:500], "qqqqq", *tokens[501:]]))
    yield one("tokens shifted by one", "tokens", string_array(tokens[1:] + tokens[:1]))
    for number, kind in ((400, 3), (400, 4), (400, 5), (1, 1), (0, 4), (400, 6), (2, 1)):
        if types[number] != kind:
            changed = [*types[:number], kind, *types[number + 1 :]]
            yield one(f"type of token {number} = {kind}", "token_type", int32_array(changed))
    yield one("token types missing", "token_type", None)
    if "merges" in content:
        merges = list(content["merges"])
        yield one("merges reversed", "merges", string_array(merges[::-1]))
        yield one("every second merge dropped", "merges", string_array(merges[::2]))
        yield one("one merge dropped", "merges", string_array(merges[:100] + merges[101:]))
        yield one("two merges exchanged", "merges", string_array([merges[1], merges[0], *merges[2:]]))
        yield one("no merges", "merges", string_array([]))
    if "scores" in content:
        scores = list(content["scores"])
        yield one("scores negated", "scores", float32_array([-score for score in scores]))
        yield one("scores all zero", "scores", float32_array([0.0] * len(scores)))
        yield one("scores shuffled", "scores", float32_array(scores[::-1]))
        yield one("add_space_prefix inverted", "add_space_prefix", boolean(not content.get("add_space_prefix", True)))
    else:
        for name in ("gpt-2", "llama-bpe", "deepseek-llm", "falcon", "starcoder", "default", "tekken", "qwen35"):
            yield one(f"pre = {name}", "pre", string(name))
        yield one("pre missing", "pre", None)
    yield one("model = another", "model", string("llama" if content["model"] == "gpt2" else "gpt2"))

"""Describes a checkpoint or a GGUF file from its headers: its layers, its sizes, and the possible results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from compressors.model.description.family import Family
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.files.gguf.kv_types import bytes_per_value
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.estimating.sizes import format_size
from exporter.planning.flags import Flags
from exporter.planning.possible_steps import STEPS, refusals

__all__ = ["describe", "description_table", "mtp_sentence", "parts_read_past"]

_FLOAT32 = 4  # bytes of a cached value in ONNX Runtime


def describe(folder: Path) -> dict[str, Any]:
    """Layout, routing rule and sizes, as plain data.

    Raises:
        InputError: the path holds no model that can be read.
    """
    checkpoint = open_source(folder)
    spec = checkpoint.spec
    return {
        "folder": str(folder),
        "identity": checkpoint.identity(),
        "family": spec.model_type,
        "architecture": checkpoint.family.architecture,
        "layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "attention": _attention(spec),
        "experts": {"per_layer": spec.n_experts, "per_token": spec.top_k, "width": spec.expert_width},
        "routing": _routing(spec),
        "vocabulary": spec.vocab_size,
        "context": spec.context_length,
        "sliding_window": spec.window,
        "rope_type": ", ".join(dict.fromkeys(rope.kind.value for rope in spec.ropes)) or None,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": checkpoint.storage_type.torch_name,
        "stored_as": checkpoint.stored_as,
        "notes": list(checkpoint.notes),
        "weight_files": len(checkpoint.files),
        "parameters": spec.parameters,
        "active_parameters": _active_parameters(spec),
        "bytes": checkpoint.n_bytes,
        "expert_bytes": sum(layer.n_experts * layer.expert_parameters for layer in spec.layers)
        * checkpoint.storage_type.itemsize,
        "gguf_architecture": checkpoint.family.gguf.architecture,
        "layer_kinds": [_layer_kind(layers) for layers in _kinds_of_layers(spec)],
        "cache_bytes_per_token": _cache_bytes(spec),
        "parts_read_past": list(parts_read_past(checkpoint)),
        "containers": {container.value: refusal(spec, container) for container in Container},
        "steps": {
            step.name: {
                "flags": step.flags,
                "containers": {container.value: why for container, why in refusals(step, spec).items()},
            }
            for step in STEPS
        },
    }


def parts_read_past(checkpoint: Source) -> Iterator[str]:
    """Yields the parts of a checkpoint that the family's rules read past, each with its number of tensors.

    Of layers for MTP it also says how they can be kept, or why they cannot.
    """
    for part, n_tensors in checkpoint.parts_read_past.items():
        keeping = f": {mtp_sentence(checkpoint.family)}" if part == MTP_PART else ""
        yield f"{part} ({n_tensors} tensors){keeping}"


def mtp_sentence(family: Family) -> str:
    """Says whether a family's layer for MTP can be kept."""
    if family.mtp is not None:
        return "kept in GGUF files with `--keep-mtp`, for llama.cpp's drafts"
    return f"cannot be kept, because {family.why_no_mtp}" if family.why_no_mtp else "no checkpoint has one"


def _attention(spec: ModelSpec) -> dict[str, int] | None:
    """The heads of the first layer that has grouped-query attention."""
    for mixer in (layer.mixer for layer in spec.layers):
        if isinstance(mixer, GroupedQuery):
            return {"heads": mixer.n_heads, "kv_heads": mixer.n_kv_heads, "head_dim": mixer.head_dim}
    return None


def _routing(spec: ModelSpec) -> str:
    """The routing rules in words; a model has one, unless its layers differ."""
    rules = (layer.routed for layer in spec.layers if layer.routed is not None)
    return "; ".join(dict.fromkeys(_with_top_k(routed.routing.description, routed.top_k) for routed in rules))


def _with_top_k(description: str, top_k: int) -> str:
    score, *further = description.split(", ")
    return ", ".join((score, f"top {top_k}", *further))


def _active_parameters(spec: ModelSpec) -> int:
    """The parameters of the tensors that a token uses: all except those of experts that are not chosen."""
    idle = sum((layer.n_experts - layer.top_k) * layer.expert_parameters for layer in spec.layers)
    return spec.parameters - idle


def _cache_bytes(spec: ModelSpec) -> dict[str, int]:
    """The bytes that a token takes in the caches of all layers: in llama.cpp's default type, and in ONNX Runtime's."""
    n_values = sum(layer.mixer.cached_values for layer in spec.layers)
    return {"gguf": int(n_values * bytes_per_value(Flags.kv_type)), "onnx": n_values * _FLOAT32}


def _kinds_of_layers(spec: ModelSpec) -> list[list[tuple[int, LayerSpec]]]:
    """The layers by their structure, each kind with the numbers of its layers."""
    kinds: dict[tuple[object, ...], list[tuple[int, LayerSpec]]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault((layer.mixer, layer.feed_forward), []).append((index, layer))
    return list(kinds.values())


def _layer_kind(layers: list[tuple[int, LayerSpec]]) -> dict[str, Any]:
    numbers, (layer, *_) = zip(*layers, strict=True)
    return {
        "layers": list(numbers),
        "mixer": layer.mixer.kind,
        "heads": layer.mixer.description,
        "window": layer.mixer.window,
        "feed_forward": "no feed-forward" if layer.feed_forward is None else layer.feed_forward.description,
        "parameters": layer.parameters,
    }


def description_table(description: Mapping[str, Any]) -> Table:
    """The description for a terminal."""
    experts, attention = description["experts"], description["attention"]
    share = description["expert_bytes"] / description["bytes"]
    rows = {
        "model": f"{description['folder']} ({description['family']}, {description['architecture']})",
        "parameters": f"{description['parameters']:,} ({description['active_parameters']:,} active per token)",
        "size": f"{format_size(description['bytes'])} in {description['dtype']}, {share:.0%} of it experts",
        "files": f"{description['weight_files']} of weights"
        + (f", {description['stored_as']}, read as {description['dtype']}" if description["stored_as"] else ""),
        "layers": f"{description['layers']}, hidden size {description['hidden_size']}",
        "experts": f"{experts['per_layer']} per layer, {experts['per_token']} per token, width {experts['width']}",
        "routing": description["routing"],
        "attention": "none with key-value heads"
        if attention is None
        else f"{attention['heads']} heads, {attention['kv_heads']} key-value heads of {attention['head_dim']}",
        "vocabulary": f"{description['vocabulary']:,} tokens, "
        f"embeddings {'tied' if description['tied_embeddings'] else 'not tied'}",
        "context": f"{description['context']:,} tokens"
        + (
            f", within the sliding window of {description['sliding_window']:,}" if description["sliding_window"] else ""
        ),
        "rotary": str(description["rope_type"] or "none: nothing is turned"),
        "GGUF": f"architecture {description['gguf_architecture']}",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    for name, value in _further_rows(description):
        table.add_row(name, value)
    for note in description["notes"]:
        table.add_row("note", note)
    return table


def _further_rows(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for number, kind in enumerate(description["layer_kinds"]):
        window = f", window {kind['window']:,}" if kind["window"] else ""
        made_of = f"{kind['mixer']} ({kind['heads']}{window}); {kind['feed_forward']}"
        which = "each layer" if len(description["layer_kinds"]) == 1 else _ranges(kind["layers"])
        yield "" if number else "made of", f"{which}: {made_of}"
    cache = description["cache_bytes_per_token"]
    yield "cache", f"{cache['gguf']:,} bytes per token as {Flags.kv_type}, {cache['onnx']:,} as float32 in ONNX Runtime"
    for number, part in enumerate(description["parts_read_past"]):
        yield "" if number else "read past", part
    yield "written as", ", ".join(_holders(description["containers"])) or "nothing"
    yield from (("", why) for why in description["containers"].values() if why is not None)
    yield from _step_rows(description["steps"])


def _step_rows(steps: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """A row for each set of containers: the steps whose results exactly these can hold."""
    by_holders: dict[tuple[str, ...], list[str]] = {}
    for name, step in steps.items():
        by_holders.setdefault(_holders(step["containers"]), []).append(name)
    for number, (holders, names) in enumerate(sorted(by_holders.items(), key=lambda entry: -len(entry[0]))):
        where = "" if len(holders) == len(Container) else f"as {' and '.join(holders)} only: "
        yield "" if number else "smaller by", (where if holders else "not possible: ") + ", ".join(names)


def _holders(refusals_by_container: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(Container(name).label for name, why in refusals_by_container.items() if why is None)


def _ranges(numbers: list[int]) -> str:
    """Layers for people: ``layers 0-2, 4``."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0]):
        (_, first), *others = run
        runs.append(f"{first}-{others[-1][1]}" if others else str(first))
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(runs)}"

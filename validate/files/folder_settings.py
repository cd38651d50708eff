"""Checks the configurations beside an ONNX graph, which clients read before they run it.

``genai_config.json`` is onnxruntime-genai's (``src/config.h``), ``config.json`` and ``generation_config.json`` are
transformers' and optimum's. With a wrong number there, a client runs another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import onnx

from compressors.model.config.reading import language_model_config, read_spec
from compressors.model.description.onnx_cache import Attention, cache_heads
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import MoeExportError
from compressors.model.files.json_file import read_json
from compressors.model.files.onnx_names import ROTARY_COSINE, STATES, is_state
from compressors.model.files.tokenizer_files import load_tokenizer
from compressors.model.sources.source import Source

__all__ = ["folder_setting_symptoms"]

_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "early_stopping": (True, False),
    "length_penalty": (1.0,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "temperature": (1.0,),
    "top_k": (0, 1, 50),
    "top_p": (1.0, 0.0),
}
"""Values of ``search`` in genai_config.json that change nothing, for settings that the original does not name."""

_NOT_COMPARED = frozenset({"_from_model_config", "transformers_version"})
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def folder_setting_symptoms(graph: Path, source: Source, spec: ModelSpec) -> list[str]:
    """Lists where the files beside a graph do not fit a model.

    Args:
        graph: the ``.onnx`` file.
        source: the original.
        spec: the model that the graph should compute.
    """
    folder, generation = graph.parent, _read(source.tokenizer_folder / "generation_config.json")
    return [
        *_genai_symptoms(folder / "genai_config.json", graph, source, spec, generation or {}),
        *_config_symptoms(folder, source, spec),
        *_generation_symptoms(folder / "generation_config.json", source, generation),
    ]


def _genai_symptoms(
    path: Path, graph: Path, source: Source, spec: ModelSpec, generation: Mapping[str, Any]
) -> Iterator[str]:
    config = _read(path)
    if config is None:
        return
    model = _object(config, "model")
    decoder, search = _object(model, "decoder"), _object(config, "search")
    proto = onnx.load(graph, load_external_data=False).graph
    attention = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention))
    heads = cache_heads(attention)
    for found, wanted in (
        ("vocab_size", spec.vocab_size),
        ("decoder.hidden_size", spec.hidden_size),
        ("decoder.head_size", heads.width),
        ("decoder.num_attention_heads", attention.n_heads),
        ("decoder.num_key_value_heads", heads.number),
        ("decoder.num_hidden_layers", spec.n_layers),
        ("decoder.filename", graph.name),
    ):
        value = decoder.get(found.partition(".")[2]) if found.startswith("decoder.") else model.get(found)
        if value != wanted:
            yield f"genai_config.json: {found} is {value!r}, the model's is {wanted!r}"
    positions = _table_length(proto, spec)
    context: Any = model.get("context_length")
    longest = min(spec.context_length, positions or spec.context_length)
    if not _is_count(context) or context > longest or (positions is not None and context != longest):
        yield f"genai_config.json: context_length is {context!r}, that of graph and model is {longest}"
    yield from _name_symptoms(decoder, proto)
    yield from _token_symptoms("genai_config.json", model, source, generation)
    length = search.get("max_length")
    if length is not None and (not _is_count(length) or (_is_count(context) and length > context)):
        yield f"genai_config.json: max_length of search is {length!r}, the context {context!r}"
    for name, neutral in _SAMPLING.items():
        if name in search and search[name] not in neutral and search[name] != generation.get(name):
            yield f"genai_config.json: {name} of search is {search[name]!r}, which the original does not ask for"
    chunk = search.get("chunk_size")
    if chunk is not None and not _is_count(chunk):
        yield f"genai_config.json: chunk_size of search is {chunk!r}, and must be a number of tokens"


def _name_symptoms(decoder: Mapping[str, Any], graph: onnx.GraphProto) -> Iterator[str]:
    """Yields names of inputs and outputs that the graph does not have, or that are not given and have no default.

    Names of states follow from those of keys, unless a layer keeps nothing but its convolution's last inputs.
    """
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        names = {_of_all_layers(value.name) for value in values}
        if any(name.endswith(f".{STATES[1]}") for name in names):
            names = {name for name in names if not is_state(name)}
        said = _object(decoder, kind)
        for key, name in said.items():
            if not isinstance(name, str) or _of_all_layers(name) not in names:
                yield f"genai_config.json: decoder.{kind}.{key} is {name!r}, which the graph does not have"
        names -= {tensor.name for tensor in graph.initializer}
        for name in sorted(names - {_of_all_layers(str(name)) for name in said.values()}):
            yield f"genai_config.json: decoder.{kind} lacks {name}, which the graph has"


def _of_all_layers(name: str) -> str:
    """The name with ``%d`` as its layer."""
    return ".".join("%d" if part.isdigit() else part for part in name.split("."))


def _token_symptoms(
    where: str, found: Mapping[str, Any], source: Source, generation: Mapping[str, Any]
) -> Iterator[str]:
    """Ids of begin, end and padding: those of the original's configurations, or of its tokenizer."""
    config = language_model_config(source.config)
    tokenizer = _tokenizer_ids(source.tokenizer_folder)
    is_copy = where == "generation_config.json" and bool(generation)
    for name in _TOKEN_IDS:
        if is_copy and _ids(found.get(name)) == _ids(generation.get(name)):
            continue
        known = [_ids(place.get(name)) for place in (generation, config, tokenizer)]
        allowed = set().union(*known)
        value = _ids(found.get(name))
        if name == "pad_token_id" and not allowed:
            allowed = set().union(*(_ids(place.get("eos_token_id")) for place in (generation, config, tokenizer)))
        needed = next((ids for ids in known if ids), set()) if name == "eos_token_id" else set()
        if not value <= allowed or not needed <= value or (allowed and not value and name != "bos_token_id"):
            yield f"{where}: {name} is {found.get(name)!r}, the original's {sorted(allowed)}"
        elif name == "bos_token_id" and not value and _ids(config.get(name)):
            yield f"{where}: {name} is absent, the original's {sorted(allowed)}"


def _config_symptoms(folder: Path, source: Source, spec: ModelSpec) -> Iterator[str]:
    """``config.json`` as it would be read as a checkpoint's."""
    path = folder / "config.json"
    config = _read(path)
    if config is None or spec.written.family is not spec.family:  # then it describes the dense counterpart
        return
    try:
        found = read_spec(folder)
    except MoeExportError as error:
        yield f"config.json cannot be read as the model's ({error})"
        return
    is_value, wanted_value = _described(found), _described(spec)
    for key, wanted in wanted_value.items():
        if is_value.get(key) != wanted:
            yield f"config.json: {key} is {is_value.get(key)!r}, the model's is {wanted!r}"
    for rope, own in zip_longest(found.ropes, spec.ropes):
        # files may be written for a shorter context
        if rope is None or own is None or replace(rope, trained_context=own.trained_context) != own:
            values, wanted = ("absent" if each is None else each.in_config() for each in (rope, own))
            yield f"config.json: rope_parameters are {values}, the model's {wanted}"
    if found.context_length > spec.context_length:
        yield f"config.json: max_position_embeddings is {found.context_length}, the model's {spec.context_length}"
    original = language_model_config(source.config)
    for name in _TOKEN_IDS:
        if _ids(config.get(name)) != _ids(original.get(name)):
            yield f"config.json: {name} is {config.get(name)!r}, the original's {original.get(name)!r}"


def _described(spec: ModelSpec) -> Mapping[str, Any]:
    """The settings of config.json that describe a model."""
    tied = {"model_type": spec.model_type, "tie_word_embeddings": spec.tied_embeddings}
    return tied | dict(spec.family.settings(spec))


def _generation_symptoms(path: Path, source: Source, original: Mapping[str, Any] | None) -> Iterator[str]:
    found = _read(path)
    if found is None:
        if original:
            yield "generation_config.json is absent; the original has one"
        return
    if original is None:
        yield from _token_symptoms("generation_config.json", found, source, {})
        for name, neutral in _SAMPLING.items():
            if name in found and found[name] not in neutral:
                yield f"generation_config.json: {name} is {found[name]!r}; the original says nothing of it"
        return
    yield from _token_symptoms("generation_config.json", found, source, original)
    for name in sorted((found.keys() | original.keys()) - _NOT_COMPARED - set(_TOKEN_IDS)):
        if found.get(name) != original.get(name):
            yield f"generation_config.json: {name} is {found.get(name)!r}, the original's {original.get(name)!r}"


def _table_length(graph: onnx.GraphProto, spec: ModelSpec) -> int | None:
    """Positions that the rotary tables cover; None if there are none."""
    lengths = {tensor.name: int(tensor.dims[0]) for tensor in graph.initializer if len(tensor.dims) == 2}
    names = [ROTARY_COSINE]
    for node in graph.node:
        place = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}.get(node.op_type)
        if place is not None and len(node.input) > place:
            names.append(node.input[place])
    length = next((lengths[name] for name in names if name in lengths), None)
    short = None if spec.rope is None else spec.rope.switches_after
    return length - short if length is not None and short is not None and length > short else length


def _tokenizer_ids(folder: Path) -> Mapping[str, Any]:
    tokenizer = load_tokenizer(folder)
    return {name: getattr(tokenizer, name) for name in _TOKEN_IDS}


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {token for token in values if token is not None}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any] | None:
    """Reads a configuration: None if there is none, empty if it is damaged, so that every key counts as missing."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except MoeExportError:
        return {}

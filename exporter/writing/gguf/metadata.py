"""The key-values that describe the model: identity and licence under ``general``, numbers under the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from gguf import GGML_QUANT_VERSION, Metadata, size_label

from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.names import shown
from compressors.model.sources.source import Origin
from exporter.publishing.model_name import hub_id
from exporter.writing.gguf.container import Value, string, uint32, value_of
from exporter.writing.gguf.layout import quantization

__all__ = ["gguf_file_name", "model_metadata", "moe_size_label", "source_ancestors", "source_license"]

_HUB_URL = "https://huggingface.co"
_LARGEST_CARD = 16_000_000  # bytes


def model_metadata(
    spec: ModelSpec, source: Origin, name: str, mix: str, types: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """All metadata apart from the tokenizer's; the source gives licence and ancestry.

    The mix and the types are those of :func:`exporter.writing.gguf.layout.plan_tensors`, and so are the errors.

    Raises:
        InputError: the front matter of the source's README.md cannot be read.
    """
    file_type = {"general.file_type": uint32(quantization(spec, mix, types).file_type)}
    version = {"general.quantization_version": uint32(GGML_QUANT_VERSION)}
    return {**_general(spec, source, name), **file_type, **version, **_architecture(spec)}


def moe_size_label(spec: ModelSpec) -> str:
    """Returns a label like ``64x1.5B``: the number of experts, and the parameters of a model with one expert per layer.

    For a dense model it is the number of its parameters, such as ``1.5B``. gguf-py counts the same way (``size_label``
    in ``gguf-py/gguf/utility.py``).
    """
    written = spec.written
    expert = sum(layer.expert_parameters for layer in written.blocks if layer.n_experts)
    total = written.parameters + (0 if written.mtp is None else written.mtp.parameters)
    return size_label(total, total - written.n_experts * expert, expert, written.n_experts)


def gguf_file_name(name: str, spec: ModelSpec, mix: str, types: Mapping[str, str] | None = None) -> str:
    """``NAME-SIZE-TYPE.gguf``, ggml's naming convention (``docs/gguf.md`` of ggml).

    The mix and the types are those of :func:`exporter.writing.gguf.layout.plan_tensors`, and so are the errors.
    """
    base = name.rsplit("/", 1)[-1].strip().replace(" ", "-")
    return f"{base}-{moe_size_label(spec)}-{quantization(spec, mix, types).label}.gguf"


def _general(spec: ModelSpec, source: Origin, name: str) -> dict[str, Value]:
    # a size in the name, such as 30B, is the source's: gguf-py recognises it by the source's parameters
    parts = Metadata.get_model_id_components(name, source.spec.parameters)
    _, organization, base_name, finetune, version, _ = parts
    card = _model_card(source.tokenizer_folder)
    texts = {
        "general.architecture": spec.written.family.gguf.architecture,  # llama.cpp wants it first
        "general.type": "model",
        "general.name": name,
        "general.organization": organization,
        "general.basename": base_name,
        "general.finetune": finetune,
        "general.version": version,
        "general.size_label": moe_size_label(spec),
        "general.quantized_by": "moe-export",
        "general.license": _joined(card.get("license")),
        "general.license.name": _joined(card.get("license_name")),
        "general.license.link": _joined(card.get("license_link")),
    }
    values = {key: string(text) for key, text in texts.items() if text}
    return values | _base_models(source.path, card)


def _architecture(spec: ModelSpec) -> dict[str, Value]:
    """Hyper-parameters (``LLM_KV_NAMES`` in ``src/llama-arch.cpp``)."""
    gguf = spec.written.family.gguf
    values = {**gguf.keys(spec.written), **gguf_rope_of(spec).keys}
    return {f"{gguf.architecture}.{key}": value_of(value) for key, value in values.items()}


def _base_models(path: Path, card: Mapping[str, Any]) -> dict[str, Value]:
    """The model this one was made of: the hub's name for the source, else what the source says about itself."""
    source = hub_id(path)
    ancestors = [source] if source else _named_ancestors(card)
    if not ancestors:
        return {}
    values = {"general.base_model.count": uint32(len(ancestors))}
    for index, ancestor in enumerate(map(str, ancestors)):
        organization, _, model = ancestor.rpartition("/")
        values[f"general.base_model.{index}.name"] = string(model)
        if organization:
            values[f"general.base_model.{index}.organization"] = string(organization)
            values[f"general.base_model.{index}.repo_url"] = string(f"{_HUB_URL}/{ancestor}")
    return values


def _named_ancestors(card: Mapping[str, Any]) -> list[str]:
    named = card.get("base_model") or []
    return [named] if isinstance(named, str) else list(named)


def _model_card(folder: Path) -> Mapping[str, str | list[str]]:
    """The texts and lists of texts between the --- lines of README.md; nothing else there is repeated in files."""
    path = folder / "README.md"
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_CARD:
            raise InputError(
                f"{path} has {path.stat().st_size:,} bytes, too many for a model card: shorten or remove it"
            )
        card = Metadata.load_model_card(folder)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(
            f"{path}: the block between the --- lines is not YAML ({shown(str(error))}); correct or remove it"
        ) from None
    entries = {key: [text for text in map(_text, _listed(entry)) if text] for key, entry in card.items()}
    return {key: texts if isinstance(card[key], list) else texts[0] for key, texts in entries.items() if texts}


def _listed(entry: object) -> list[object]:
    return entry if isinstance(entry, list) else [entry]


def _text(entry: object) -> str:
    """A text or number of a model card, made valid UTF-8; empty for anything else."""
    return str(entry).encode("utf-8", "ignore").decode("utf-8") if isinstance(entry, str | int | float) else ""


def source_license(source: Origin) -> dict[str, str | None]:
    """The licence that the source's model card names, with its own name and its page or file; None: it names none.

    Raises:
        InputError: the front matter of the source's README.md cannot be read.
    """
    card = _model_card(source.tokenizer_folder)
    return {name: _joined(card.get(name)) or None for name in ("license", "license_name", "license_link")}


def source_ancestors(source: Origin) -> list[str]:
    """The models that the source's model card names as those it was made of.

    Raises:
        InputError: the front matter of the source's README.md cannot be read.
    """
    return _named_ancestors(_model_card(source.tokenizer_folder))


def _joined(entry: object) -> str:
    """A model card's entry as one text; lists are allowed there."""
    if entry is None:
        return ""
    return ",".join(map(str, entry)) if isinstance(entry, list) else str(entry)

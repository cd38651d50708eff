"""Makes docs/families.md from the families' own descriptions and the capability table.

python -m docs.families_page > docs/families.md
"""

from __future__ import annotations

import pkgutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from compressors.model import families
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
from compressors.model.description.feed_forward import Routed
from compressors.model.description.mixers import NoMixer
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.onnx_cache import WithStates
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.families.refused import REASONS
from exporter.capabilities.rules import Container, Feature
from exporter.capabilities.table import TABLE, refusal
from exporter.inspection import mtp_sentence
from exporter.planning.possible_steps import STEPS, refusals

__all__ = ["families_page"]

_HEAD = """\
# Families

This page is made from the code: `python -m docs.families_page > docs/families.md`. `moe-export inspect MODEL` says the
same of a model of your own. What a container cannot hold is refused before any work, with a sentence that says what to
use instead.

## What the containers can hold

"yes" means that nothing is refused for it. Settings are in [settings.md](settings.md), ways of making a model smaller
in [compression.md](compression.md).
"""


def families_page() -> str:
    """The page."""
    sections = ["\n".join(_family_section(module)) for module in _modules()]
    return "\n".join([_HEAD, *_containers_table(), *_steps_list(), *sections, *_refused_families()]) + "\n"


def _modules() -> list[ModuleType]:
    """The modules of the families that are read."""
    names = [f"{families.__name__}.{module.name}" for module in pkgutil.iter_modules(families.__path__)]
    return [module for module in map(import_module, names) if hasattr(module, "FAMILY")]


def _containers_table() -> Iterator[str]:
    yield from _table_head("", *(container.label for container in Container))
    for feature in Feature:
        limits = {rule.container: rule.limit for rule in TABLE if rule.feature is feature}
        yield _row(feature.value, *(limits.get(container, "yes") for container in Container))


def _steps_list() -> Iterator[str]:
    yield "\n## Ways of making a model smaller\n"
    yield from _table_head("result", "flags, or choices of a recipe")
    for step in STEPS:
        yield _row(step.name, f"`{step.flags}`")


def _family_section(module: ModuleType) -> Iterator[str]:
    family: Family = module.FAMILY
    spec = _example(family)
    title, _, text = (module.__doc__ or "").strip().partition(": ")
    sentences = " ".join(text.split())
    yield f"\n## {title}\n\n{sentences[:1].upper()}{sentences[1:]}\n"
    yield from _table_head("", "")
    yield _row("`model_type`", f"`{family.model_type}`, {family.architecture}")
    yield _row("layers", "; ".join(dict.fromkeys(map(_kinds, spec.layers))))
    yield _row("routing", "; ".join(_routing_rules(spec)))
    yield _row("in llama.cpp", f"`{family.gguf.architecture}`")
    yield _row("GGUF files as originals", "no" if family.gguf.settings is None else "yes")
    yield _row("rotary embeddings as GGUF", ", ".join(f"`{kind}`" for kind in _ropes_in_gguf(spec)) or "none")
    yield _row("ONNX in optimum", "no, it has recurrent states" if _has_states(spec) else "as far as optimum knows it")
    dense = family.dense
    yield _row(
        "a dense student",
        "no architecture matches"
        if dense is None
        else f"`{dense.family.model_type}`; in llama.cpp `{dense.family.gguf.architecture}`",
    )
    yield _row("read past", "; ".join(part.name for part in family.skipped) or "nothing")
    if any(part.name == MTP_PART for part in family.skipped):
        yield _row("the layer for MTP", mtp_sentence(family))
    yield from _steps_table(spec)
    refused = list(_refused_variants(spec))
    if refused:
        yield "\nRefused:\n"
        yield from refused


def _has_states(spec: ModelSpec) -> bool:
    """True if ONNX files have states beside keys and values, which ORTModelForCausalLM does not take."""
    return any(isinstance(layer.mixer, WithStates) for layer in spec.layers)


_WITHOUT_A_DEFAULT: Mapping[str, Mapping[str, object]] = {
    "afmoe": {"mup_enabled": True},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2},
    "gemma4_text": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "final_logit_softcapping": 30.0,
    },
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {"hidden_size": 2048, "mamba_n_heads": 64, "layer_types": (["mamba"] * 7 + ["attention"]) * 4},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8, "intermediate_size": 3072},
    "nemotron_h": {"hybrid_override_pattern": "MEM*E" * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
}
"""Settings that a family needs and transformers has no usable default of, as the hub's models have them."""


def _by_defaults(family: Family) -> ModelSpec:
    """The model of a ``config.json`` that leaves everything to transformers' defaults."""
    assert family.read is not None, "it is a supported family"
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": family.model_type, **_WITHOUT_A_DEFAULT.get(family.model_type, {})}
        return family.read(Settings(config, Path(folder) / "config.json"))


def _example(family: Family) -> ModelSpec:
    """A model of the family that all containers can hold, if there is one among those of other settings."""
    spec = _by_defaults(family)
    candidates = [spec, *_variants(spec).values()]
    held = (each for each in candidates if not any(refusal(each, container) for container in Container))
    return next(held, spec)


def _refused_families() -> Iterator[str]:
    yield "\n## Families that are refused\n"
    yield "A model of any other family is refused with the nearest supported ones and what these lack, by its settings"
    yield "and the names of its tensors. Of some it is known why they cannot be supported yet:\n"
    yield from (f"* `{model_type}`: {reason}" for model_type, reason in REASONS.items())


def _kinds(layer: LayerSpec) -> str:
    feed_forward = layer.feed_forward
    if feed_forward is None:
        return f"{layer.mixer.kind} alone"
    shared = "" if not isinstance(feed_forward, Routed) or feed_forward.shared is None else " and a shared one"
    both = f"{feed_forward.kind}{shared}"
    return f"{both} alone" if isinstance(layer.mixer, NoMixer) else f"{layer.mixer.kind}, {both}"


def _routing_rules(spec: ModelSpec) -> list[str]:
    """The rules that its settings can say."""
    found = dict.fromkeys(layer.routed.routing for layer in spec.layers if layer.routed is not None)
    for variant in (_normalizing(spec, normalizes) for normalizes in (True, False)):
        if spec.family.settings(variant) != spec.family.settings(spec):
            found |= dict.fromkeys(layer.routed.routing for layer in variant.layers if layer.routed is not None)
    return [rule.description for rule in found]


def _steps_table(spec: ModelSpec) -> Iterator[str]:
    yield ""
    yield from _table_head("can be written with", *(container.label for container in Container))
    for step in STEPS:
        found = refusals(step, spec)
        yield _row(step.name, *("yes" if found[container] is None else "no" for container in Container))


def _refused_variants(spec: ModelSpec) -> Iterator[str]:
    for container in Container:
        always = refusal(spec, container)
        if always is not None:
            yield f"* all models, as {container.label}: {always}"
            continue
        for name, variant in _variants(spec).items():
            sentence = refusal(variant, container)
            is_setting = spec.family.settings(variant) != spec.family.settings(spec)
            if sentence is not None and (is_setting or variant.tied_embeddings != spec.tied_embeddings):
                yield f"* {name}, as {container.label}: {sentence}"


def _variants(spec: ModelSpec) -> Mapping[str, ModelSpec]:
    """Models of the family with other settings, such as some containers cannot hold."""
    return {
        "tied embeddings": replace(spec, tied_embeddings=True),
        "a head of its own": replace(spec, tied_embeddings=False),
        "weights that are normalised": _normalizing(spec, True),
        "weights that are not normalised": _normalizing(spec, False),
        "heads whose values together are no more than half of the hidden size": _with_narrow_heads(spec),
    }


def _normalizing(spec: ModelSpec, normalizes: bool) -> ModelSpec:
    layers = [
        layer
        if layer.routed is None
        else replace(
            layer,
            feed_forward=replace(layer.routed, routing=replace(layer.routed.routing, normalizes=normalizes)),
        )
        for layer in spec.layers
    ]
    return replace(spec, layers=tuple(layers))


def _with_narrow_heads(spec: ModelSpec) -> ModelSpec:
    layers = tuple(replace(layer, hidden_size=2 * layer.hidden_size) for layer in spec.layers)
    return replace(spec, hidden_size=2 * spec.hidden_size, layers=layers)


def _ropes_in_gguf(spec: ModelSpec) -> Iterator[str]:
    if spec.rope is None:
        return
    for kind in RopeKind:
        rope = _scaled(spec.rope, kind)
        layers = tuple(
            layer if layer.mixer.rope is None else replace(layer, mixer=replace(layer.mixer, rope=rope))
            for layer in spec.layers
        )
        if refusal(replace(spec, layers=layers), Container.GGUF) is None:
            yield kind.value


def _scaled(rope: Rope, kind: RopeKind) -> Rope:
    """A rotary embedding of a kind, with values that none is special for."""
    factors = tuple(1.0 + index for index in range(rope.width // 2))
    scaled = replace(rope, kind=kind, factor=4.0, original_context=4096, trained_context=4096, attention_factor=1.0)
    return replace(scaled, short_factors=factors, long_factors=tuple(2 * factor for factor in factors))


def _table_head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|---" * len(names) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


if __name__ == "__main__":
    sys.stdout.write(families_page())

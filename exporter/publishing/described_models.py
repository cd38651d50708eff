"""Describes the original and the student: parts of report.json."""

from __future__ import annotations

from typing import Any

from compressors.model.description.onnx_cache import Attention, cache_heads
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap
from exporter.planning.recipe import SourceChoice
from exporter.publishing.license_files import license_files
from exporter.writing.gguf.metadata import source_ancestors, source_license

__all__ = ["described_source", "described_student", "stored_bytes"]


def described_source(choice: SourceChoice, source: Source) -> dict[str, Any]:
    """Describes the original; heads are those that ONNX graphs cache, where all layers with attention are alike."""
    spec = source.spec
    kinds = {cache_heads(layer.mixer) for layer in spec.layers if isinstance(layer.mixer, Attention)}
    heads = kinds.pop() if len(kinds) == 1 else None
    return {
        "model": choice.model,
        "identity": choice.identity,
        "family": spec.model_type,
        "parameters": spec.parameters,
        "bytes": stored_bytes(source),
        "dtype": source.storage_type.torch_name,
        "stored_as": source.stored_as,
        "n_layers": spec.n_layers,
        "n_moe_layers": sum(layer.routed is not None for layer in spec.layers),
        "n_recurrent_layers": sum(layer.mixer.is_recurrent for layer in spec.layers),
        "n_experts": spec.n_experts,
        "expert_width": spec.expert_width,
        "top_k": spec.top_k,
        "n_kv_heads": None if heads is None else heads.number,
        "head_dim": None if heads is None else heads.width,
        **source_license(source),
        "license_files": [path.name for path in license_files(source)],
        "projector": _projector(source),
        "base_models": source_ancestors(source),
    }


def _projector(source: Source) -> dict[str, Any] | None:
    """The parts that llama.cpp keeps in a projector, a file beside the model's; None if the original has none.

    It fits as long as the width of the embeddings stays, which llama.cpp checks (``tools/mtmd/mtmd.cpp``): no method
    changes that.
    """
    parts = [part.name for part in source.family.skipped if part.in_projector and part.name in source.parts_read_past]
    return {"part": parts[0], "width": source.spec.hidden_size} if parts else None


def stored_bytes(source: Source) -> int:
    """Bytes of the original: of its weights in storage dtype, or of its files where they hold quantized weights."""
    return source.n_bytes if source.stored_as is None else sum(file.stat().st_size for file in source.files)


def described_student(teacher: ModelSpec, experts: ExpertMap) -> dict[str, Any]:
    """Describes the student: the parts of the original that it keeps."""
    spec = experts.spec_of(teacher)
    layers = {layer.source: layer for layer in experts.layers}
    is_dense = not spec.written.n_experts
    return {
        "dense": is_dense,
        "n_layers": spec.n_layers,
        "n_moe_layers": sum(layer.routed is not None for layer in spec.layers) if not is_dense else None,
        "n_experts": spec.n_experts if not is_dense else None,  # in the layer with the most
        "fewest_experts": min(len(layer.groups) for layer in experts.layers if layer.groups) if not is_dense else None,
        "expert_width": spec.expert_width,  # in a dense student, the width of the feed-forward
        "top_k": spec.top_k if not is_dense else None,
        "parameters": spec.parameters,
        # by layer of the original: its experts that survive, by themselves, as the first of a merged group, or as
        # neurons of the dense feed-forward; None if it has no experts
        "kept": [
            None if described.routed is None else _kept(layers.get(index), is_dense)
            for index, described in enumerate(teacher.layers)
        ],
        "merged": not is_dense and any(len(group) > 1 for layer in experts.layers for group in layer.groups),
        "expert_map": experts.to_json(),
    }


def _kept(layer: LayerMap | None, is_dense: bool) -> list[int]:
    if layer is None:
        return []
    return sorted(expert for group in layer.groups for expert in group) if is_dense else sorted(layer.kept)

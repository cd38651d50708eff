"""Describes a checkpoint from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from compressors.model.sources.checkpoint import Checkpoint
from exporter.estimating.sizes import format_size

__all__ = ["describe", "description_table"]


def describe(folder: Path) -> dict[str, Any]:
    """Layout, routing rule and sizes, as plain data.

    Raises:
        InputError: the folder holds no checkpoint that can be read.
    """
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    expert_bytes = spec.n_layers * spec.n_experts * spec.expert_parameters * checkpoint.dtype.itemsize
    active = spec.parameters - spec.n_layers * (spec.n_experts - spec.top_k) * spec.expert_parameters
    return {
        "folder": str(folder),
        "identity": checkpoint.identity(),
        "family": spec.model_type,
        "architecture": checkpoint.family.architecture,
        "layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "attention": {"heads": spec.n_heads, "kv_heads": spec.n_kv_heads, "head_dim": spec.head_dim},
        "experts": {"per_layer": spec.n_experts, "per_token": spec.top_k, "width": spec.expert_width},
        "routing": f"softmax over all experts, top {spec.top_k}"
        + (", weights normalised" if spec.normalize_top_k else ""),
        "vocabulary": spec.vocab_size,
        "context": spec.context_length,
        "sliding_window": spec.window,
        "rope_type": spec.rope.kind.value,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "stored_as": checkpoint.stored_as,
        "notes": list(checkpoint.notes),
        "weight_files": len(checkpoint.files),
        "parameters": spec.parameters,
        "active_parameters": active,
        "bytes": checkpoint.n_bytes,
        "expert_bytes": expert_bytes,
        "gguf_architecture": checkpoint.family.gguf.architecture,
    }


def description_table(description: dict[str, Any]) -> Table:
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
        "attention": f"{attention['heads']} heads, {attention['kv_heads']} key-value heads of {attention['head_dim']}",
        "vocabulary": f"{description['vocabulary']:,} tokens, "
        f"embeddings {'tied' if description['tied_embeddings'] else 'not tied'}",
        "context": f"{description['context']:,} tokens"
        + (
            f", within the sliding window of {description['sliding_window']:,}" if description["sliding_window"] else ""
        ),
        "rotary": str(description["rope_type"]),
        "GGUF": f"architecture {description['gguf_architecture']}",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    for note in description["notes"]:
        table.add_row("note", note)
    return table

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
    shape = checkpoint.shape
    expert_bytes = shape.n_layers * shape.n_experts * shape.expert_parameters * checkpoint.dtype.itemsize
    active = shape.parameters - shape.n_layers * (shape.n_experts - shape.top_k) * shape.expert_parameters
    return {
        "folder": str(folder),
        "identity": checkpoint.identity(),
        "family": shape.model_type,
        "architecture": checkpoint.family.architecture,
        "layers": shape.n_layers,
        "hidden_size": shape.hidden_size,
        "attention": {"heads": shape.n_heads, "kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim},
        "experts": {"per_layer": shape.n_experts, "per_token": shape.top_k, "width": shape.expert_width},
        "routing": f"softmax over all experts, top {shape.top_k}"
        + (", weights normalised" if shape.normalize_top_k else ""),
        "vocabulary": shape.vocab_size,
        "context": shape.context_length,
        "sliding_window": shape.window,
        "rope_type": shape.rope.kind.value,
        "tied_embeddings": shape.tied_embeddings,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "stored_as": None if checkpoint.block_scaled is None else str(checkpoint.block_scaled),
        "notes": list(checkpoint.notes),
        "weight_files": len(checkpoint.files),
        "parameters": shape.parameters,
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

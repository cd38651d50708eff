"""A student as a Hugging Face checkpoint: one safetensors file per layer, its index, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from compressors.model.families import Role
from compressors.model.student import Student

__all__ = ["write_checkpoint"]

_COPIED = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "vocab.json",
)


def write_checkpoint(student: Student, folder: Path, progress: Callable[[int], None] | None = None) -> None:
    """Writes the student into a new folder, a layer at a time.

    Args:
        student: what to write; experts get the student's numbers and one tensor per projection, as on the hub.
        folder: is made.
        progress: called with 1 after each layer.
    """
    folder.mkdir(parents=True)
    n_files = student.shape.n_layers + 1
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(n_files):
        tensors = dict(_layer(student, number) if number < student.shape.n_layers else _global(student))
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if progress is not None and number < student.shape.n_layers:
            progress(1)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    _write_config(student, folder)


def _layer(student: Student, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    for role in student.family.layer_roles:
        yield student.name(role, layer), student.tensor(role, layer).contiguous()
    for expert in range(student.shape.n_experts):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            yield student.name(role, layer, expert), student.expert(role, layer, expert).contiguous()


def _global(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    for role in student.family.roles:
        if role.is_global and not (role is Role.HEAD and student.shape.tied_embeddings):
            yield student.name(role), student.tensor(role).contiguous()


def _write_config(student: Student, folder: Path) -> None:
    source = student.source.folder
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(student.shape.in_config(config), indent=1), encoding="utf-8")
    for pattern in _COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)

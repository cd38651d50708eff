"""Blocks of the trained models with the evidence of the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressors.calibration.splits import read_splits, tokenize
from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.moe_block import Evidence, MoeBlock

_N_BLOCKS = 8


@pytest.fixture(scope="module")
def float32_toy(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Two layers of the bundled model, stored in float32, so that what is written back is not rounded."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"))
    file = folder / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return open_source(folder)


@pytest.fixture(scope="module")
def pruned_toy(float32_toy: Source) -> Student:
    """Every other of its 32 experts."""
    return Student(float32_toy, ExpertMap.keeping(32, (tuple(range(0, 32, 2)),) * 2))


@pytest.fixture(scope="session")
def trained_block(calibration_folder: Path) -> Callable[..., tuple[MoeBlock, Evidence]]:
    """``trained_block(folder, layer)``: a trained model's MoE block; its statistics and inputs over 4,096 tokens."""
    seen: dict[Path, list[tuple[MoeBlock, Evidence]]] = {}
    tokens: list[torch.Tensor] = []  # the trained models share one vocabulary

    def block_of(folder: Path, layer: int) -> tuple[MoeBlock, Evidence]:
        if not tokens:
            tokens.append(tokenize(read_splits(calibration_folder, None), folder)[0].spread(_N_BLOCKS).tokens_BT)
        if folder not in seen:
            seen[folder] = _all_blocks(folder, tokens[0])
        return seen[folder][layer]

    return block_of


def _all_blocks(folder: Path, tokens_BT: torch.Tensor) -> list[tuple[MoeBlock, Evidence]]:
    student = Student.teacher(open_source(folder))
    model, collector = StreamedModel(student), StatisticsCollector(student.spec)
    inputs: dict[int, list[torch.Tensor]] = {}

    @contextmanager
    def keep_inputs(index: int, layer: nn.Module) -> Iterator[None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs.setdefault(index, []).append(arguments[0].reshape(-1, student.spec.hidden_size).clone())

        handle = layer.get_submodule("mlp.gate").register_forward_pre_hook(hook)
        yield
        handle.remove()

    model.stream([TokenGroup(tokens_BT, [collector.observe, keep_inputs])])
    return [
        (_block(student, layer), Evidence(collector.take(layer), torch.cat(inputs[layer])))
        for layer in range(student.spec.n_layers)
    ]


def _block(student: Student, layer: int) -> MoeBlock:
    spec, routed = student.spec, student.spec.layers[layer].routed
    assert routed is not None

    def experts(role: Role) -> torch.Tensor:
        return torch.stack([student.expert(role, layer, expert) for expert in range(spec.n_experts)])

    return MoeBlock(
        student.tensor(Role.ROUTER, layer).float(),
        torch.cat([experts(Role.EXPERT_GATE), experts(Role.EXPERT_UP)], dim=1),
        experts(Role.EXPERT_DOWN),
        spec.top_k,
        routed.routing,
        routed.glu,
    )

"""Narrower experts whose overlay holds the numbers of their neurons: their matrices are those of a whole overlay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.spec import MoeSize
from compressors.model.files.weight_file import StoredTensors
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.narrowed import narrowed_bytes, narrowed_down
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink import layerwise
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM
from compressors.shrink.moe_block import Method
from compressors.shrink.prune import Prune
from compressors.shrink.slim.width import SlimWidth

Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Checkpoint:
    """One layer of 32 experts, 128 wide, hidden size 256, in 16 bits."""
    return Checkpoint(toy_checkpoint(tmp_path_factory.mktemp("narrowed"), n_layers=1))


@pytest.fixture(scope="module")
def student_of(
    source: Checkpoint, heldout_tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Student, int]]:
    """Makes a student of eight experts by these methods; returns it, and the bytes of the tensors in its overlay."""
    tokens_BT = torch.from_numpy(heldout_tokens[: 4 * 128].reshape(4, 128))
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(tokens_BT, [collector.observe])])
    statistics = [collector.take(0)]

    def make(width: int, *methods: Method) -> tuple[Student, int]:
        targets = [LayerTarget(0, MoeSize(8, width), methods)]
        (layer,) = LayerwiseCompression(source, targets, statistics, tokens_BT, n_sample_blocks=4).run()
        path = tmp_path_factory.mktemp("overlay") / "overlay.safetensors"
        save_file(layer.overlay, path)
        overlay = StoredTensors(path)
        n_bytes = sum(overlay[name].nbytes for name in overlay)
        return Student(source, ExpertMap(32, (layer.map,))).with_overlay(overlay), n_bytes

    return make


@pytest.mark.parametrize(
    ("width", "first"),
    [(96, Prune("reap", 8)), (32, Prune("reap", 8)), (96, REAM(8))],
    ids=["factors", "own down projection", "some of them merged before"],
)
def test_its_matrices_are_those_of_a_whole_overlay(
    source: Checkpoint,
    student_of: Callable[..., tuple[Student, int]],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    first: Method,
) -> None:
    student, n_bytes = student_of(width, first, SlimWidth(width))
    monkeypatch.setattr(layerwise, "_narrowed", lambda first, second: {})
    whole, n_whole = student_of(width, first, SlimWidth(width))
    names = {
        student.name(tensor.role, 0, expert) for tensor in student.spec.layers[0].expert_tensors for expert in range(8)
    }
    assert names <= set(student.overlay) and len(student.overlay) == len(whole.overlay)
    for name in names:
        assert torch.equal(student.overlay[name], whole.overlay[name]), name
    assert n_whole == 8 * 3 * width * 256 * 2
    if isinstance(first, Prune):
        assert n_bytes <= 8 * narrowed_bytes(256, 128, width, 2) < n_whole / 2
    else:
        assert n_bytes < n_whole


def test_adapters_are_added_to_what_was_put_together(student_of: Callable[..., tuple[Student, int]]) -> None:
    student, _ = student_of(96, Prune("reap", 8), SlimWidth(96))
    down = next(tensor.role for tensor in student.spec.layers[0].expert_tensors if tensor.role.name == "EXPERT_DOWN")
    name, a_1RI, b_1OR = student.name(down, 0, 3), torch.randn(1, 2, 96), torch.randn(1, 256, 2)
    taught = student.with_overlay({f"{name}.adapter_a": a_1RI, f"{name}.adapter_b": b_1OR})
    expected = student.expert(down, 0, 3).float() + b_1OR[0] @ a_1RI[0]
    assert torch.equal(taught.expert(down, 0, 3), expected.to(student.expert_dtype))


def test_no_bit_depends_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    down_DF, factors_RM = (torch.randn(size, generator=generator) for size in ((512, 192), (64, 128)))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(narrowed_down(down_DF, range(64, 192), factors_RM))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    by_hand = down_DF[:, 64:].double().numpy() + down_DF[:, :64].double().numpy() @ factors_RM.double().numpy()
    np.testing.assert_allclose(found[0].numpy(), by_hand, rtol=1e-6)

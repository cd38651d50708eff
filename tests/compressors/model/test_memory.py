"""The places of arrays and hidden states, in memory or on disk, as the limit decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.array_file import ArrayFile
from compressors.model.files.storage_type import StorageType
from compressors.model.running.arithmetic import fastest_arithmetic
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.layers import LayerReader, layer_bytes
from compressors.model.running.memory import MemoryLimit, place, positions_at_once, working_bytes
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student


@pytest.fixture(scope="module")
def spec(fine_folder: Path) -> ModelSpec:
    return Checkpoint(fine_folder).spec


def test_an_array_file_is_numpy_s_format(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    file = ArrayFile.create(tmp_path / "x.npy", rows.shape, np.float32)
    file.write(4, rows[4:])
    file.write(0, rows[:4])
    assert np.array_equal(np.load(tmp_path / "x.npy"), rows)
    np.save(tmp_path / "y.npy", rows.astype(np.uint16))
    again = ArrayFile.open(tmp_path / "y.npy")
    assert np.array_equal(again.read(1, 3), rows[1:3])
    assert (again.shape, again.dtype, len(again)) == ((6, 2, 2), np.dtype(np.uint16), 6)


@pytest.mark.parametrize("n_bytes", [0, 5, 100, -1])
def test_a_cut_array_file_is_named(tmp_path: Path, n_bytes: int) -> None:
    np.save(tmp_path / "x.npy", np.arange(100))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:n_bytes])
    with pytest.raises(InputError, match=r"x\.npy cannot be read"):
        ArrayFile.open(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spills", [False, True])
def test_hidden_states_keep_their_bits(tmp_path: Path, dtype: torch.dtype, spills: bool) -> None:
    values = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    states = HiddenStates((10, 3, 4), dtype, tmp_path / "spill" if spills else None)
    for blocks in states.groups(4):
        states.write(blocks, values[blocks])
    assert torch.equal(states.read(slice(2, 7)), values[2:7])
    states.save(tmp_path / "saved.npy")
    other = HiddenStates((10, 3, 4), dtype)
    other.load(tmp_path / "saved.npy")
    assert torch.equal(other.read(slice(0, 10)), values)
    if spills:
        assert not list((tmp_path / "spill").iterdir()), "the file has no name, so a kill leaves nothing"


def test_a_snapshot_of_states_in_a_file_is_that_file(tmp_path: Path) -> None:
    """So there are two at a time: it stays as it is, and the next values go into another."""
    folder = tmp_path / "spill"
    first, second = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(2))
    states = HiddenStates((6, 3, 4), torch.float32, folder, named=True)
    states.write(slice(0, 6), first)
    states.save(tmp_path / "saved.npy")
    assert not list(folder.iterdir())
    states.write(slice(0, 4), second[:4])
    assert torch.equal(states.read(slice(0, 6)), first), "a layer reads what entered it"
    states.write(slice(4, 6), second[4:])
    assert torch.equal(states.read(slice(0, 6)), second)
    assert len(list(folder.iterdir())) == 1
    states.write(slice(0, 2), first[:2])  # in place again
    assert torch.equal(states.read(slice(0, 6)), torch.cat([first[:2], second[2:]]))
    assert len(list(folder.iterdir())) == 1
    states.load(tmp_path / "saved.npy")
    assert torch.equal(states.read(slice(0, 6)), first)
    states.write(slice(0, 6), second)
    assert np.array_equal(np.load(tmp_path / "saved.npy"), first.numpy())


def test_the_head_takes_the_place_of_the_layers(spec: ModelSpec, tmp_path: Path) -> None:
    large_head = replace(spec, vocab_size=1_000_000)
    head = 4 * 1_000_000 * (spec.hidden_size + 2 * positions_at_once(1_000_000))
    layer, hidden = 1000, 2500

    def placed(n_bytes: int) -> tuple[int, bool, bool]:
        placement = place(MemoryLimit(n_bytes, tmp_path), large_head, layer, hidden, held_bytes=0)
        return placement.n_resident, placement.read_ahead, placement.spill is None

    assert placed(head - 1) == (0, False, False)
    assert placed(head) == (0, True, False), "beside such a head two small layers cost nothing"
    assert placed(head + hidden + 2 * layer) == (2, True, True)


def test_room_goes_to_reading_ahead_then_hidden_states_then_layers(spec: ModelSpec, tmp_path: Path) -> None:
    layer, hidden, held = 1000, 2500, 70
    spec = replace(spec, vocab_size=256)  # the head is smaller than what a layer's computation needs
    least = held + working_bytes(spec) + layer

    def placed(n_bytes: int) -> tuple[int, bool, bool]:
        placement = place(MemoryLimit(n_bytes, tmp_path), spec, layer, hidden, held_bytes=held)
        return placement.n_resident, placement.read_ahead, placement.spill is None

    assert placed(least) == (0, False, False)
    assert placed(least + layer - 1) == (0, False, False)
    assert placed(least + layer) == (0, True, False)
    assert placed(least + layer + hidden) == (0, True, True)
    assert placed(least + layer + hidden + 3 * layer) == (3, True, True)
    assert placed(10**15) == (spec.n_layers, True, True)


@pytest.mark.parametrize(("vocab_size", "positions"), [(1000, 2048), (50304, 512), (151936, 256), (10**7, 256)])
def test_logits_are_made_in_bounded_chunks(vocab_size: int, positions: int) -> None:
    assert positions_at_once(vocab_size) == positions


@pytest.mark.parametrize(("n_resident", "read_ahead"), [(0, False), (0, True), (2, True), (6, True)])
def test_every_way_of_holding_layers_gives_their_weights(fine_folder: Path, n_resident: int, read_ahead: bool) -> None:
    student = Student.teacher(Checkpoint(fine_folder))
    reader = LayerReader(student, n_resident=n_resident, read_ahead=read_ahead, check_finite=False)
    addresses = set()
    for order in (range(6), range(5, -1, -1), range(6)):
        visited = []
        for index, weights in reader.visit(order):
            assert torch.equal(weights.down_EDF, _down(student, index))
            addresses.add(weights.down_EDF.data_ptr())
            visited.append(index)
        assert visited == list(order)
        reader.release()
    if n_resident == 6:
        assert len(addresses) == 6, "read once, and kept"


def _down(student: Student, layer: int) -> torch.Tensor:
    from compressors.model.description.roles import Role

    return torch.stack([student.expert(Role.EXPERT_DOWN, layer, expert) for expert in range(student.spec.n_experts)])


def test_a_layer_s_bytes_are_those_on_disk(family_folder: Path) -> None:
    source = Checkpoint(family_folder)
    on_disk = sum(header.n_bytes for name, header in source.headers.items() if name.startswith("model.layers.1."))
    assert layer_bytes(Student.teacher(source)) == pytest.approx(on_disk, rel=0.01)


@pytest.mark.parametrize(
    ("described", "allowed", "arithmetic"),
    [
        ("GenuineIntel avx2 avx512_bf16 amx_bf16", "ALL", "bfloat16"),
        ("GenuineIntel avx2 avx512_bf16 amx_bf16", "AVX512_CORE_BF16", "float32"),
        ("GenuineIntel avx2 avx512_bf16", "DEFAULT", "float32"),
        ("AuthenticAMD avx2 avx512_bf16", "DEFAULT", "bfloat16"),
        ("AuthenticAMD avx2 avx512_bf16", "AVX512_CORE_BF16", "bfloat16"),
        ("AuthenticAMD avx2 avx512_bf16", "AVX2", "float32"),
        ("AuthenticAMD avx2", "ALL", "float32"),
    ],
)
def test_bfloat16_where_the_processor_multiplies_it_faster(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: str, allowed: str, arithmetic: str
) -> None:
    description = tmp_path / "cpuinfo"
    description.write_text(described, encoding="utf-8")
    monkeypatch.setattr("compressors.model.running.arithmetic._CPU_DESCRIPTION", description)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert fastest_arithmetic(replace(spec, hidden_size=2048), StorageType.BF16, "cpu") == arithmetic


def test_small_models_and_other_dtypes_compute_in_float32(spec: ModelSpec) -> None:
    large = replace(spec, hidden_size=2048)
    assert fastest_arithmetic(spec, StorageType.BF16, "cuda") == "float32"
    assert fastest_arithmetic(large, StorageType.F16, "cuda") == "float32"
    assert fastest_arithmetic(large, StorageType.BF16, "cuda") == "bfloat16"

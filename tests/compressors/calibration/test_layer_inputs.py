"""Layer inputs on disk: those of the first tokens, in 16 bits, with each process's blocks in their places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressors.calibration.layer_inputs import LayerInputs, PassingInputs, write_layer_inputs
from compressors.calibration.sizes import KEPT_TOKENS, layer_input_bytes, n_kept_blocks
from compressors.model.errors import InputError
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student


def test_whole_blocks_are_kept_up_to_a_number_of_tokens() -> None:
    assert n_kept_blocks(1000, 512) == 62
    assert n_kept_blocks(7, 512) == 7
    assert n_kept_blocks(3, 100_000) == 1


def test_bytes_on_disk_are_foreseen(float32_toy: Source, tmp_path: Path) -> None:
    spec = float32_toy.spec
    LayerInputs.create(tmp_path, spec.n_layers, (3, 16, spec.hidden_size))
    headers = 128 * (spec.n_layers + 1)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == layer_input_bytes(spec, 3 * 16) + headers
    assert layer_input_bytes(spec, 10**9) == (spec.n_layers + 1) * 32_000 * spec.hidden_size * 2


def test_each_process_writes_the_kept_ones_of_its_blocks(tmp_path: Path) -> None:
    LayerInputs.create(tmp_path, 1, (3, 4, 2))
    states_BTD = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    for mine in ([0, 2, 4], [1, 3]):
        states = HiddenStates((len(mine), 4, 2), torch.float32)
        states.write(slice(0, len(mine)), states_BTD[mine])
        LayerInputs(tmp_path).keep(1, states, mine)
    inputs = LayerInputs(tmp_path)
    assert inputs.shape == (3, 4, 2)
    assert torch.equal(inputs.read(1, slice(0, 3)), states_BTD[:3].bfloat16())
    assert not inputs.read(0, slice(0, 3)).any()


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer-002\.npy cannot be read"):
        LayerInputs(tmp_path).read(2, slice(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_what_each_layer_is_given(float32_toy: Source, tmp_path: Path, dtype: torch.dtype) -> None:
    """Runs each layer on its kept inputs: it gives those that were kept for the next one."""
    tokens_BT = torch.arange(3 * 8).view(3, 8)
    model = StreamedModel(Student.teacher(float32_toy))
    done: list[int] = []
    inputs = write_layer_inputs(model, tokens_BT, tmp_path, dtype, done.append)
    assert sum(done) == model.spec.n_layers
    (states,) = model.stream([TokenGroup(tokens_BT, dtype=dtype)])
    assert torch.equal(inputs.read(0, slice(0, 3)), model.embed(tokens_BT).bfloat16())
    assert torch.equal(inputs.read(2, slice(0, 3)), states.read(slice(0, 3)).bfloat16())
    for index, weights in model.weights(range(2)):
        entering, leaving = (HiddenStates(states.shape, dtype) for _ in range(2))
        entering.write(slice(0, 3), inputs.read(index, slice(0, 3)).to(dtype))
        model.run(index, weights, entering, leaving)
        kept = inputs.read(index + 1, slice(0, 3)).float()
        assert (leaving.read(slice(0, 3)).float() - kept).norm() < 0.01 * kept.norm()
    assert tokens_BT.numel() <= KEPT_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limited", [False, True])
def test_passing_ones_are_those_that_are_kept(
    float32_toy: Source, tmp_path: Path, dtype: torch.dtype, limited: bool
) -> None:
    """In their order, once more, forwards past a layer, and back."""
    tokens_BT, student = torch.arange(3 * 8).view(3, 8), Student.teacher(float32_toy)
    kept = write_layer_inputs(StreamedModel(student), tokens_BT, tmp_path / "kept", dtype)
    limit = MemoryLimit(10**9, tmp_path / "spill") if limited else None
    passing = PassingInputs(StreamedModel(student, limit=limit), tokens_BT, dtype)
    assert passing.shape == kept.shape == (3, 8, student.spec.hidden_size)
    for layer in (0, 1, 1, 2, 0, 2):
        read, expected = passing.reader(layer), kept.reader(layer)
        for blocks in (slice(0, 3), slice(1, 2)):
            assert torch.equal(read(blocks), expected(blocks)), layer
    assert limited == (tmp_path / "spill").exists()
    assert not [*tmp_path.glob("spill/*")]  # the states' file has no name

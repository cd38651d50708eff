"""The transforms of llama.cpp's converters, against the converters' own steps, and their inverses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from compressors.model.description.transforms import (
    SAME,
    Chain,
    EverySecond,
    HeadMatrices,
    InterleaveRotary,
    NegativeExponential,
    PlusOne,
    Squeezed,
    TiledHeads,
    Transform,
    UngroupedRows,
)

_SIZES = {"H": 4, "h": 6, "n": 2, "v": 3, "r": 8, "k": 2, "q": 6, "d": 5, "w": 15}
"""H heads of h values, n of which one part takes and v another; k key heads of d values for q value heads."""

_KV = ("n", "v")
_QKVZ = ("d", "d", "w", "w")  # of each key head: its query, its key, and three values and gates
_VALUES = TiledHeads("k", "q", "d", before=("r",))

_CASES: Mapping[str, tuple[tuple[int, ...], tuple[Transform, ...]]] = {
    "same": ((24, 7), (SAME,)),
    "rotary": ((24, 7), (InterleaveRotary(),)),
    "rotary of a bias": ((24,), (InterleaveRotary(),)),
    "keys and values of heads": (
        (20, 8),
        (HeadMatrices("H", _KV, 0, is_transposed=True), HeadMatrices("H", _KV, 1)),
    ),
    "ungrouped": ((80, 7), (UngroupedRows("k", _QKVZ, (0, 1, 2)), UngroupedRows("k", _QKVZ, (3,)))),
    "alternating": ((3, 10), (EverySecond(0), EverySecond(1))),
    "alternating rows": ((10, 3), (EverySecond(0, axis=0), EverySecond(1, axis=0))),
    "tiled rows": ((30, 7), (TiledHeads("k", "q", "d"),)),
    "tiled rows after others": ((38, 7), (_VALUES,)),
    "tiled heads of one value": ((6,), (TiledHeads("k", "q"),)),
    "tiled columns": ((7, 30), (TiledHeads("k", "q", "d", of_inputs=True),)),
    "squeezed": ((38, 1, 4), (Squeezed(),)),
    "squeezed and tiled": ((38, 1, 4), (Chain((Squeezed(), _VALUES)),)),
}


@pytest.mark.parametrize("case", _CASES)
def test_reading_undoes_writing(case: str) -> None:
    shape, transforms = _CASES[case]
    values = torch.arange(float(np.prod(shape))).reshape(shape).bfloat16().float()
    read = torch.full(shape, -1.0)
    for transform in transforms:
        part = transform.write(values, _SIZES)
        assert tuple(part.shape) == transform.shape(shape, _SIZES)
        transform.read(part, read, _SIZES)
    assert torch.equal(read, values)


@pytest.mark.parametrize(
    "transform", [PlusOne(), NegativeExponential(), Chain((NegativeExponential(), TiledHeads("k", "q")))]
)
def test_functions_are_undone_in_float32(transform: Transform) -> None:
    values = torch.linspace(-3, 3, 6).bfloat16()
    part = transform.write(values, _SIZES)
    assert part.dtype is torch.float32
    read = torch.empty(6)
    transform.read(part, read, _SIZES)
    torch.testing.assert_close(read, values.float(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(part, values.float())


def test_functions_are_those_of_the_converter() -> None:
    values = torch.tensor([0.5, -2.0])
    torch.testing.assert_close(PlusOne().write(values, {}), torch.tensor([1.5, -1.0]))
    torch.testing.assert_close(NegativeExponential().write(values, {}), torch.tensor([-1.6487213, -0.1353353]))


def test_keys_and_values_of_heads_are_the_converter_s() -> None:
    """``DeepseekV2Model.modify_tensors``."""
    values = torch.randn(20, 8)
    keys, of_values = torch.split(values.view(4, 5, 8), [2, 3], dim=1)
    _, transforms = _CASES["keys and values of heads"]
    assert torch.equal(transforms[0].write(values, _SIZES), keys.transpose(1, 2))
    assert torch.equal(transforms[1].write(values, _SIZES), of_values)


def test_ungrouped_rows_are_the_converter_s() -> None:
    """``Qwen3NextModel.modify_tensors``, which works on the transposed matrix."""
    values = torch.randn(80, 7)
    q, k, v, z = torch.split(values.permute(1, 0).contiguous().view(-1, 2, 40), [5, 5, 15, 15], dim=-1)
    qkv = torch.cat([part.contiguous().view(7, -1) for part in (q, k, v)], dim=-1).permute(1, 0)
    _, transforms = _CASES["ungrouped"]
    assert torch.equal(transforms[0].write(values, _SIZES), qkv)
    assert torch.equal(transforms[1].write(values, _SIZES), z.contiguous().view(7, -1).permute(1, 0))


def test_tiled_heads_are_the_converter_s() -> None:
    """Value heads 0, 1, 2 of key head 0 and 3, 4, 5 of key head 1 become 0, 3, 1, 4, 2, 5."""
    assert TiledHeads("k", "q").write(torch.arange(6), _SIZES).tolist() == [0, 3, 1, 4, 2, 5]
    values = torch.arange(38.0)
    tiled = values[8:].reshape(2, 3, 5).permute(1, 0, 2).reshape(30)
    assert torch.equal(_VALUES.write(values, _SIZES), torch.cat([values[:8], tiled]))


def test_alternating_values_are_gates_and_ups() -> None:
    values = torch.arange(12).reshape(2, 6)
    assert EverySecond(0).write(values, {}).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert EverySecond(1).write(values, {}).tolist() == [[1, 3, 5], [7, 9, 11]]


def test_rows_that_belong_together_can_be_written_and_read_by_themselves() -> None:
    values, rotary = torch.randn(24, 7), InterleaveRotary()
    whole, step = rotary.write(values, _SIZES), rotary.rows_together(_SIZES)
    read = torch.empty_like(values)
    for first in range(0, 24, step):
        part = rotary.write(values[first : first + step], _SIZES)
        assert torch.equal(part, whole[first : first + step])
        rotary.read(part, read[first : first + step], _SIZES)
    assert torch.equal(read, values)
    assert all(transform.rows_together(_SIZES) is None for transform in _CASES["ungrouped"][1])


@pytest.mark.parametrize("case", ["same", "ungrouped", "tiled rows", "tiled columns", "keys and values of heads"])
def test_inputs_stay_those_of_the_rows(case: str) -> None:
    """A row times its inputs gives what it gave, wherever the part has its own order of them."""
    shape, transforms = _CASES[case]
    values, inputs_N = torch.randn(shape), torch.rand(shape[1])
    products = (values @ inputs_N).sort().values
    found = []
    for transform in transforms:
        moved = transform.inputs(inputs_N, _SIZES)
        assert (moved is not None and torch.equal(moved, inputs_N)) == transform.keeps_inputs
        if moved is not None:
            found.append((transform.write(values, _SIZES) @ moved).flatten())
    expected = products if len(found) == len(transforms) else (values.view(4, 5, 8)[:, 2:] @ inputs_N).flatten()
    torch.testing.assert_close(torch.cat(found).sort().values, expected.sort().values)

"""Codes chosen by error feedback (GPTQ, arXiv 2210.17323) on scales that were found without, as a test of the checks.

They raise a matrix's own error to lower that of its output, so a check of weights must accept them. For ggml's types,
ggml gives the values of a block: dequantizing a block with equal codes gives each place's levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType, search_blocks
from compressors.model.sources.student import Student
from compressors.model.sources.weights import StoredType
from validate.files.quantization_error import quantized

__all__ = ["FEEDBACK_TYPES", "fed_back", "with_error_feedback"]

_T = GGMLQuantizationType
_DAMPING = 0.05  # of the mean diagonal
_NIBBLES, _PAIRS, _BIT = [code * 0x11 for code in range(16)], [code * 0x55 for code in range(4)], [0, 0xFF]

_CODES: Mapping[GGMLQuantizationType, tuple[tuple[slice, list[int]], ...]] = {
    _T.Q4_0: ((slice(2, 18), _NIBBLES),),
    _T.Q4_1: ((slice(4, 20), _NIBBLES),),
    _T.IQ4_NL: ((slice(2, 18), _NIBBLES),),
    _T.MXFP4: ((slice(1, 17), _NIBBLES),),
    _T.Q5_0: ((slice(2, 6), _BIT), (slice(6, 22), _NIBBLES)),
    _T.Q5_1: ((slice(4, 8), _BIT), (slice(8, 24), _NIBBLES)),
    _T.Q8_0: ((slice(2, 34), list(range(256))),),
    _T.Q2_K: ((slice(16, 80), _PAIRS),),
    _T.Q3_K: ((slice(0, 32), _BIT), (slice(32, 96), _PAIRS)),
    _T.Q4_K: ((slice(16, 144), _NIBBLES),),
    _T.Q5_K: ((slice(16, 48), _BIT), (slice(48, 176), _NIBBLES)),
    _T.Q6_K: ((slice(0, 128), _NIBBLES), (slice(128, 192), _PAIRS)),
    _T.IQ4_XS: ((slice(8, 136), _NIBBLES),),
}
"""Where the codes of a block lie (``ggml-common.h``), and the bytes that set all of them alike."""

FEEDBACK_TYPES = tuple(_CODES)


def with_error_feedback(student: Student, ggml_type: GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """An overlay: the experts' projections as such a file holds them; IQ4_NL where rows do not fit the type."""
    overlay = {}
    for layer, role, expert in _places(student):
        values = student.expert(role, layer, expert).float()
        if values.shape[1] % BLOCK_SIZES[ggml_type][0] == 0:
            overlay[student.name(role, layer, expert)] = fed_back(values, ggml_type)
        else:
            overlay[student.name(role, layer, expert)] = fed_back(values, _T.IQ4_NL)
    return overlay


def _places(student: Student) -> Iterator[tuple[int, Role, int]]:
    for layer in range(student.spec.n_layers):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            for expert in range(student.spec.n_experts):
                yield layer, role, expert


def fed_back(values_RN: torch.Tensor, stored_type: StoredType) -> torch.Tensor:
    """The values of rows whose codes are chosen column by column, the error of each made up by the others."""
    n_rows, length = values_RN.shape
    moments_NN = _moments(length)
    importance_N = moments_NN.diagonal().float().numpy()
    if isinstance(stored_type, BlockType):
        levels_RNC = _block_levels(values_RN, importance_N, stored_type).double()
    else:
        levels_RNC = _levels(values_RN, importance_N, stored_type).double()
    order = torch.argsort(moments_NN.diagonal(), descending=True)
    factor_NN = torch.linalg.cholesky(torch.linalg.inv(moments_NN[order][:, order]), upper=True)
    left_RN, chosen_RN, rows = values_RN.double()[:, order], torch.empty(n_rows, length), torch.arange(n_rows)
    levels_RNC = levels_RNC[:, order]
    for column in range(length):
        nearest_R = (levels_RNC[:, column] - left_RN[:, column : column + 1]).abs().argmin(1)
        value_R = levels_RNC[rows, column, nearest_R]
        chosen_RN[:, order[column]] = value_R.float()
        error_R = (left_RN[:, column] - value_R) / factor_NN[column, column]
        left_RN[:, column + 1 :] -= error_R[:, None] * factor_NN[column, column + 1 :]
    return chosen_RN


def _moments(length: int) -> torch.Tensor:
    """Second moments of inputs of a few directions and uneven size, damped: float64 [N, N]."""
    generator = torch.Generator().manual_seed(length)
    inputs_TN = torch.randn(4 * length, length // 4, generator=generator) @ torch.randn(
        length // 4, length, generator=generator
    )
    inputs_TN = inputs_TN * torch.exp(0.7 * torch.randn(length, generator=generator))
    moments_NN = (inputs_TN.T @ inputs_TN).double()
    damping: torch.Tensor = _DAMPING * moments_NN.diagonal().mean() * torch.eye(length, dtype=torch.float64)
    return moments_NN + damping


def _levels(values_RN: torch.Tensor, importance_N: np.ndarray, ggml_type: GGMLQuantizationType) -> torch.Tensor:
    """Returns the values that each place can take with the kernel's scales: [R, N, codes]."""
    stored_RY = quantized(values_RN, ggml_type, importance_N)
    blocks = stored_RY.reshape(len(stored_RY), -1, BLOCK_SIZES[ggml_type][1])
    levels = []
    for codes in _products(_CODES[ggml_type]):
        alike = blocks.copy()
        for place, byte in codes:
            alike[..., place] = byte
        levels.append(dequantize_rows(alike.reshape(len(stored_RY), -1), ggml_type, values_RN.shape[1]))
    return torch.from_numpy(np.stack(levels, -1))


def _block_levels(values_RN: torch.Tensor, importance_N: np.ndarray, blocks: BlockType) -> torch.Tensor:
    """Returns the values that each place can take with the scales of ONNX Runtime's blocks: [R, N, codes]."""
    found = search_blocks(values_RN.numpy(), blocks.bits, blocks.block_size, importance_N)
    scales_RN = torch.from_numpy(found.scales_RK).repeat_interleave(blocks.block_size, dim=1)
    return scales_RN[..., None] * (torch.arange(2**blocks.bits) - 2 ** (blocks.bits - 1))


def _products(parts: tuple[tuple[slice, list[int]], ...]) -> Iterator[list[tuple[slice, int]]]:
    if not parts:
        yield []
        return
    (place, codes), *others = parts
    for code in codes:
        for rest in _products(tuple(others)):
            yield [(place, code), *rest]

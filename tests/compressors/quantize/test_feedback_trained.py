"""Error feedback on experts of the trained models, with the second moments of their own inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from compressors.model.files.gguf.ggml_types import BLOCK_SIZES
from compressors.quantize import GGMLQuantizationType, dequantize_rows
from compressors.quantize.feedback import Feedback, conditioned, quantize_rows_with_feedback
from compressors.quantize.kernels import quantize_rows
from compressors.shrink.moe_block import Evidence, MoeBlock

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]

_LAYER = 2
_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "Q2_0")


@dataclass(frozen=True)
class _Expert:
    """One expert, with its inputs and those of its down projection."""

    gate_FD: torch.Tensor
    down_DF: torch.Tensor
    inputs_TD: torch.Tensor
    neurons_TF: torch.Tensor


def _experts_by_tokens(block: MoeBlock, inputs_TD: torch.Tensor) -> list[_Expert]:
    """All experts, that of the most tokens first."""
    chosen_TK = block.route(inputs_TD).chosen_TK
    experts = []
    for expert in range(block.n_experts):
        own_TD = inputs_TD[(chosen_TK == expert).any(dim=1)]
        gate_FD, up_FD = block.gate(expert), block.up(expert)
        neurons_TF = functional.silu(own_TD @ gate_FD.T) * (own_TD @ up_FD.T)
        experts.append(_Expert(gate_FD, block.down(expert), own_TD, neurons_TF))
    return sorted(experts, key=lambda expert: -len(expert.inputs_TD))


def _moments(inputs_TN: torch.Tensor) -> torch.Tensor:
    return inputs_TN.T @ inputs_TN / len(inputs_TN)


def _error(
    weights_RN: torch.Tensor, quantized: npt.NDArray[np.uint8], kind: GGMLQuantizationType, inputs_TN: torch.Tensor
) -> float:
    """The squared error of the outputs over the inputs themselves, without any moments."""
    difference = torch.from_numpy(dequantize_rows(quantized, kind, weights_RN.shape[1])) - weights_RN
    return float((inputs_TN @ difference.T).square().mean())


@pytest.mark.parametrize("name", _TYPES)
def test_error_of_the_outputs_is_a_fraction_of_the_kernels(
    family_folder: Path, trained_block: TrainedBlock, name: str
) -> None:
    """The shares left in llama.cpp's formats, measured once on other text: 0.3 for gate, 0.4 to 0.6 for down."""
    ggml_type = GGMLQuantizationType[name]
    block, evidence = trained_block(family_folder, _LAYER)
    expert = _experts_by_tokens(block, evidence.sample_TD)[0]
    for weights_RN, inputs_TN, share in (
        (expert.gate_FD, expert.inputs_TD, 0.5),
        (expert.down_DF, expert.neurons_TF, 0.7),
    ):
        if weights_RN.shape[1] % BLOCK_SIZES[ggml_type][0] != 0:
            continue
        moments_NN = _moments(inputs_TN)
        kernel = quantize_rows(weights_RN, ggml_type, moments_NN.diagonal(), name=name)
        chosen = quantize_rows_with_feedback(
            weights_RN, ggml_type, moments_NN.diagonal(), Feedback.of(moments_NN), name=name
        )
        left = _error(weights_RN, chosen, ggml_type, inputs_TN) / _error(weights_RN, kernel, ggml_type, inputs_TN)
        assert left < share, (name, tuple(weights_RN.shape), left)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K"])
def test_a_rare_experts_other_tokens_gain_too(family_folder: Path, trained_block: TrainedBlock, name: str) -> None:
    """Moments from half of the rarest expert's few tokens; the error on the other half."""
    ggml_type = GGMLQuantizationType[name]
    block, evidence = trained_block(family_folder, _LAYER)
    expert = _experts_by_tokens(block, evidence.sample_TD)[-1]
    layer_DD = _moments(evidence.sample_TD)
    for weights_RN, inputs_TN, shared_NN, share in (
        (expert.gate_FD, expert.inputs_TD, layer_DD, 0.85),
        (expert.down_DF, expert.neurons_TF, None, 1.05),
    ):
        if weights_RN.shape[1] % BLOCK_SIZES[ggml_type][0] != 0:
            continue
        seen_TN, other_TN = inputs_TN[::2], inputs_TN[1::2]
        mixed_NN = conditioned(_moments(seen_TN), len(seen_TN), shared_NN)
        kernel = quantize_rows(weights_RN, ggml_type, mixed_NN.diagonal(), name=name)
        chosen = quantize_rows_with_feedback(
            weights_RN, ggml_type, mixed_NN.diagonal(), Feedback.of(mixed_NN), name=name
        )
        left = _error(weights_RN, chosen, ggml_type, other_TN) / _error(weights_RN, kernel, ggml_type, other_TN)
        assert left < share, (name, tuple(weights_RN.shape), len(seen_TN), left)

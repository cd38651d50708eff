"""Grouped experts with biases and another function: forward and gradients against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from compressors.model.running.experts import GROUPED_EXPERTS, register_grouped_experts


@pytest.fixture
def stock() -> GptOssExperts:
    """Six experts; gates and ups lie interleaved and transposed."""
    config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return experts


def _grouped(stock: GptOssExperts) -> GptOssExperts:
    """The same experts as they run here: gate rows first."""
    register_grouped_experts()
    config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = GROUPED_EXPERTS
    experts = GptOssExperts(config)
    gate_up_EFD, bias_EF = stock.gate_up_proj.detach().transpose(1, 2), stock.gate_up_proj_bias.detach()
    values = {
        "gate_up_proj": torch.cat([gate_up_EFD[:, ::2], gate_up_EFD[:, 1::2]], dim=1),
        "gate_up_proj_bias": torch.cat([bias_EF[:, ::2], bias_EF[:, 1::2]], dim=1),
        "down_proj": stock.down_proj.detach().transpose(1, 2).contiguous(),
        "down_proj_bias": stock.down_proj_bias.detach(),
    }
    for name, value in values.items():
        setattr(experts, name, torch.nn.Parameter(value, requires_grad=False))
    return experts


def test_outputs_and_gradients_are_those_of_transformers(stock: GptOssExperts) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(20, 16, generator=generator)
    logits_TE = torch.randn(20, 6, generator=generator)
    weights_TK, chosen_TK = logits_TE.softmax(-1).topk(3)
    found = []
    for experts in (stock, _grouped(stock)):
        inputs = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
        output_TD = experts(inputs[0], chosen_TK, inputs[1])
        gradients = torch.autograd.grad(output_TD.square().sum(), inputs)
        found.append((output_TD.detach(), *gradients))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_gradients_come_gate_rows_first(stock: GptOssExperts) -> None:
    """Squares of the gradients at the first product, summed, against autograd's at the stock module's bias."""
    experts, seen = _grouped(stock), {}
    experts.gradient_observer = lambda expert, gate_up, _down: seen.update({expert: gate_up.sum(0)})
    hidden_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    chosen_TK, weights_TK = torch.tensor([[4, 1, 0]] * 9), torch.full((9, 3), 0.3)
    experts(hidden_TD, chosen_TK, weights_TK).sum().backward()
    stock(hidden_TD, chosen_TK, weights_TK).sum().backward()
    bias_F = stock.gate_up_proj_bias.grad
    assert bias_F is not None and sorted(seen) == [0, 1, 4]
    for expert, gradient_F in seen.items():
        expected_F = torch.cat([bias_F[expert, ::2], bias_F[expert, 1::2]])
        torch.testing.assert_close(gradient_F, expected_F, rtol=1e-4, atol=1e-4)

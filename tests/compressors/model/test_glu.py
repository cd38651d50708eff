"""The function between an expert's products, in numpy and torch, against every family of transformers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from compressors.model.description.glu import SWIGLU, Activation, Glu
from tests.compressors.model.moe_families import CASES, MoeCase, layers_with_experts
from tests.compressors.model.tiny_families import tiny_model

_BY_FAMILY = tuple({case.model_type: case for case in CASES}.values())


@pytest.fixture(scope="module")
def products() -> torch.Tensor:
    """The first product of some experts: [T, 2F]."""
    return torch.randn(50, 32, generator=torch.Generator().manual_seed(2)) * 3


def _parts(case: MoeCase, products: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gate and up."""
    if not case.glu.is_gated:
        return None, products
    if case.is_interleaved:
        return products[:, ::2], products[:, 1::2]
    gate, up = products.chunk(2, dim=-1)
    return gate, up


def _numpy(values: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
    return None if values is None else values.numpy()


@pytest.mark.parametrize("case", _BY_FAMILY, ids=lambda case: case.model_type)
def test_both_forms_are_what_transformers_does(case: MoeCase, products: torch.Tensor) -> None:
    layer = layers_with_experts(tiny_model(case.model_type, **case.settings), case.routed())[0]
    experts = layer.get_submodule(case.routed().experts_module)
    assert experts.has_gate == case.glu.is_gated
    gate, up = _parts(case, products)
    expected = experts._apply_gate(products) if experts.has_gate else experts.act_fn(products)
    by_torch = case.glu.torch_apply(gate, up)
    torch.testing.assert_close(by_torch, expected, rtol=1e-6, atol=1e-6)
    by_numpy = case.glu.apply(_numpy(gate), up.numpy())
    assert by_numpy.dtype == np.float32
    np.testing.assert_allclose(by_numpy, expected.numpy(), rtol=1e-5, atol=2e-6)


def test_the_usual_function_is_torchs_to_the_bit(products: torch.Tensor) -> None:
    gate, up = products.chunk(2, dim=-1)
    assert torch.equal(SWIGLU.torch_apply(gate, up), nn.functional.silu(gate) * up)


def test_limits_hold_by_hand() -> None:
    clamped = Glu(alpha=2.0, limit=1.0, offset=1.0)
    gate, up = np.array([-9, 5, 0.5], np.float32), np.array([3, -4, 0.5], np.float32)
    expected = [-9 / (1 + np.exp(18)) * 2, 0.0, 0.5 / (1 + np.exp(-1)) * 1.5]
    np.testing.assert_allclose(clamped.apply(gate, up), expected, atol=1e-6)


def test_large_values_do_not_overflow() -> None:
    values = np.array([-500, 500], np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = SWIGLU.apply(values, np.ones(2, np.float32))
        by_tanh = Glu(Activation.GELU_TANH).apply(values, np.ones(2, np.float32))
    assert found.tolist() == by_tanh.tolist() == [0.0, 500.0]


@pytest.mark.parametrize("case", _BY_FAMILY, ids=lambda case: case.model_type)
def test_gradients_are_the_functions(case: MoeCase, products: torch.Tensor) -> None:
    gate, up = products[:4].double().chunk(2, dim=-1)
    inputs = (gate.clone().requires_grad_(), up.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda gate, up: case.glu.torch_apply(gate if case.glu.is_gated else None, up), inputs
    )

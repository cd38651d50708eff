"""The function between an expert's two products.

:meth:`Glu.apply` is the definition, in numpy; :meth:`Glu.torch_apply` does the same on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["SWIGLU", "Activation", "Glu"]

Floats = npt.NDArray[np.float32]


class Activation(StrEnum):
    """The function that is applied to the gate, or to up where there is no gate."""

    SILU = "silu"  # x sigmoid(x)
    GELU_TANH = "gelu_pytorch_tanh"  # Hendrycks and Gimpel, arXiv 1606.08415, by its tanh approximation
    RELU_SQUARED = "relu2"  # max(x, 0)^2


@dataclass(frozen=True)
class Glu:
    """activation(gate) * up, a gated linear unit (Shazeer, arXiv 2002.05202).

    Attributes:
        activation: see :class:`Activation`.
        alpha: silu becomes x sigmoid(alpha x).
        limit: the gate is at most this, and up lies between this and its negative; None: no limit.
        offset: added to up.
        is_gated: False if there is no gate; the activation is then applied to up.
    """

    activation: Activation = Activation.SILU
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0
    is_gated: bool = True

    def apply(self, gate: Floats | None, up: Floats) -> Floats:
        """Returns the activations, in the shape of ``up``; ``gate`` is None where there is none."""
        if gate is None:
            return self._activated(up)
        if self.limit is not None:
            gate, up = np.minimum(gate, self.limit), np.clip(up, -self.limit, self.limit)
        return np.asarray(self._activated(gate) * (up + np.float32(self.offset)), dtype=np.float32)

    def torch_apply(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Does what :meth:`apply` does, for tensors; gradients pass through."""
        if gate is None:
            return self._torch_activated(up)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._torch_activated(gate) * (up + self.offset if self.offset else up)

    def _activated(self, values: Floats) -> Floats:
        if self.activation is Activation.RELU_SQUARED:
            activated = np.square(np.maximum(values, 0))
        elif self.activation is Activation.GELU_TANH:
            inner = np.float32(np.sqrt(2 / np.pi)) * (values + np.float32(0.044715) * values**3)
            activated = values * (1 + np.tanh(inner)) / 2
        else:
            activated = values * np.exp(-np.logaddexp(np.float32(0), -np.float32(self.alpha) * values))
        return np.asarray(activated, dtype=np.float32)

    def _torch_activated(self, values: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        if self.activation is Activation.RELU_SQUARED:
            return functional.relu(values).square()
        if self.activation is Activation.GELU_TANH:
            return functional.gelu(values, approximate="tanh")
        return functional.silu(values) if self.alpha == 1.0 else values * (values * self.alpha).sigmoid()


SWIGLU = Glu()
"""silu(gate) * up, which most families compute."""

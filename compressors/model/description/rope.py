"""The rotary position embedding of a model: its angles, as transformers computes them.

transformers' ``modeling_rope_utils.py`` is the definition; every function here does the same float32 operations in the
same order, so that results are equal bit for bit. The scalings: linear (Chen et al., 2023), dynamic NTK (bloc97 and
emozilla, 2023), YaRN (Peng et al., 2023), LongRoPE (Ding et al., 2024), Llama 3.1's and Gemma 4's (proportional: the
whole head is split into pairs, and only the first ones are turned).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Rope", "RopeKind", "attention_multiplier"]


class RopeKind(StrEnum):
    """The ways of scaling the angles; the values are those of ``rope_type`` in ``config.json``."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LONGROPE = "longrope"
    LLAMA3 = "llama3"
    PROPORTIONAL = "proportional"


@dataclass(frozen=True)
class Rope:
    """Everything that the angles depend on; a field that a kind does not use keeps its default."""

    kind: RopeKind
    theta: float  # the base
    width: int  # values of a head that are turned, from its first on; with proportional scaling all of the head
    share: float = 1.0  # of the head, as the setting partial_rotary_factor says; proportional: of pairs, others stay
    interleaved: bool = False  # a pair is two neighbours; otherwise they are half the width apart
    trained_context: int = 0  # dynamic scaling begins beyond this many tokens
    factor: float = 1.0
    original_context: int = 0  # tokens that the model was trained on before it was scaled
    attention_factor: float = 1.0  # multiplies cosine and sine
    beta_fast: float = 32.0  # YaRN: rotations within the original context ...
    beta_slow: float = 1.0
    truncate: bool = True  # ... between whose dimensions, whole or not, it goes from one frequency to the other
    all_dim_multiplier: float = 0.0  # DeepSeek's mscale_all_dim, see attention_scale
    low_frequency_factor: float = 1.0  # Llama 3
    high_frequency_factor: float = 4.0
    short_factors: tuple[float, ...] = ()  # LongRoPE, [width / 2]
    long_factors: tuple[float, ...] = ()

    @property
    def switches_after(self) -> int | None:
        """The length of the longest text that is turned by the short factors; None: all texts are turned alike.

        Dynamic scaling does not count: it begins beyond the trained context, for which nothing is written.
        """
        switches = self.kind is RopeKind.LONGROPE and self.short_factors != self.long_factors
        return self.original_context if switches else None

    def table_lengths(self, context_length: int) -> tuple[int, ...]:
        """Positions of each table of cosines and sines: one for the context, or before it one for shorter texts."""
        shorter = self.switches_after
        if shorter is None or shorter >= context_length:
            return (context_length,)
        return shorter, context_length

    def inverse_frequencies(self, n_tokens: int) -> torch.Tensor:
        """Angles per position for a text of ``n_tokens`` tokens: float32 [width / 2]."""
        if self.kind is RopeKind.LINEAR:
            return self._plain() / self.factor
        if self.kind is RopeKind.DYNAMIC:
            return self._dynamic(max(n_tokens, self.trained_context))
        if self.kind is RopeKind.YARN:
            return self._yarn()
        if self.kind is RopeKind.LONGROPE:
            import torch

            factors = self.long_factors if n_tokens > self.original_context else self.short_factors
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * self._powers())
        if self.kind is RopeKind.PROPORTIONAL:
            return self._proportional()
        return self._llama3() if self.kind is RopeKind.LLAMA3 else self._plain()

    def attention_scale(self, plain: float) -> float:
        """Returns the factor of the products of queries and keys, given that of an unscaled embedding.

        DeepSeek's attention multiplies it for a longer context, in both of the multiplied vectors alike.
        """
        multiplier = attention_multiplier(self.factor, self.all_dim_multiplier)
        return plain * multiplier * multiplier

    def in_config(self) -> dict[str, Any]:
        """Returns ``rope_parameters`` of ``config.json``, with every value written out."""
        used: dict[RopeKind, dict[str, Any]] = {
            RopeKind.DEFAULT: {},
            RopeKind.LINEAR: {"factor": self.factor},
            RopeKind.DYNAMIC: {"factor": self.factor},
            RopeKind.YARN: {
                "factor": self.factor,
                "attention_factor": self.attention_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "truncate": self.truncate,
            },
            RopeKind.LONGROPE: {
                "factor": self.factor,
                "attention_factor": self.attention_factor,
                "short_factor": list(self.short_factors),
                "long_factor": list(self.long_factors),
            },
            RopeKind.LLAMA3: {
                "factor": self.factor,
                "low_freq_factor": self.low_frequency_factor,
                "high_freq_factor": self.high_frequency_factor,
            },
            RopeKind.PROPORTIONAL: {"factor": self.factor},
        }
        some = {
            "original_max_position_embeddings": self.original_context or None,
            "partial_rotary_factor": None if self.share == 1.0 else self.share,
            "mscale_all_dim": self.all_dim_multiplier or None,
        }
        written = {key: value for key, value in some.items() if value is not None}
        return {"rope_type": self.kind.value, "rope_theta": self.theta, **used[self.kind], **written}

    def _powers(self, theta: float | None = None) -> torch.Tensor:
        import torch

        exponents = torch.arange(0, self.width, 2, dtype=torch.int64).float() / self.width
        powers: torch.Tensor = (self.theta if theta is None else theta) ** exponents
        return powers

    def _plain(self) -> torch.Tensor:
        return 1.0 / self._powers()

    def _proportional(self) -> torch.Tensor:
        import torch

        n_turned = int(self.share * self.width // 2)
        still = torch.zeros(self.width // 2 - n_turned)
        return torch.cat((self._plain()[:n_turned], still)) / self.factor

    def _dynamic(self, n_tokens: int) -> torch.Tensor:
        stretched = (self.factor * n_tokens / self.trained_context) - (self.factor - 1)
        return 1.0 / self._powers(self.theta * stretched ** (self.width / (self.width - 2)))

    def _yarn(self) -> torch.Tensor:
        import torch

        powers = self._powers()
        low, high = self._corrected_dimension(self.beta_fast), self._corrected_dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        if low == high:
            high += 0.001
        ramp = torch.clamp((torch.arange(self.width // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        kept = 1 - ramp
        return (1.0 / (self.factor * powers)) * (1 - kept) + (1.0 / powers) * kept

    def _corrected_dimension(self, n_rotations: float) -> float:
        """The dimension that turns ``n_rotations`` times within the original context."""
        turns = math.log(self.original_context / (n_rotations * 2 * math.pi))
        return (self.width * turns) / (2 * math.log(self.theta))

    def _llama3(self) -> torch.Tensor:
        import torch

        plain = self._plain()
        wavelengths = 2 * math.pi / plain
        longest = self.original_context / self.low_frequency_factor
        shortest = self.original_context / self.high_frequency_factor
        scaled = torch.where(wavelengths > longest, plain / self.factor, plain)
        smooth = (self.original_context / wavelengths - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where(~(wavelengths < shortest) & ~(wavelengths > longest), between, scaled)


def attention_multiplier(factor: float, multiplier: float = 1.0) -> float:
    """Returns YaRN's correction of attention for a context that is ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

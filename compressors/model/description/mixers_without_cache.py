"""Mixers that keep nothing for each token: those that carry states from token to token, and none at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["GatedDelta", "Mamba2", "NoMixer", "Recurrent", "ShortConvolution"]


class _WithoutCache:
    """A mixer that turns nothing and keeps nothing for each token."""

    @property
    def rope(self) -> None:
        """None: nothing is turned."""
        return None

    @property
    def window(self) -> int | None:
        """None: no mask limits anything."""
        return None

    @property
    def cached_values(self) -> int:
        """Values that are cached for each token: none."""
        return 0

    @property
    def cached_head(self) -> int:
        """Values that lie together in a cache: none."""
        return 0


class Recurrent(_WithoutCache):
    """A mixer that keeps states of one size for a text of any length, and nothing for each token."""

    @property
    def is_recurrent(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class GatedDelta(Recurrent):
    """A gated delta rule: each token fades a state and corrects what the state holds under its key (arXiv 2412.06464).

    Queries, keys and values go through a convolution over the last tokens first. A value head has a state of its own;
    those that share a key head follow each other.

    Attributes:
        n_key_heads: heads of queries and of keys.
        n_value_heads: heads of values; the key heads divide them.
        key_dim: values of a query or key.
        value_dim: values of a value.
        kernel: tokens that the convolution covers, the newest included.
    """

    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    kind: ClassVar[str] = "a gated delta rule"
    key_epsilon: ClassVar[float] = 1e-6
    """Added to the squares of a query or key before it is divided by its length (``l2norm`` in transformers)."""

    @property
    def scale(self) -> float:
        """The factor of the products of queries and states."""
        return 1 / math.sqrt(self.key_dim)

    @property
    def description(self) -> str:
        """Its sizes in words."""
        return (
            f"{self.n_key_heads} key heads of {self.key_dim}, {self.n_value_heads} value heads of {self.value_dim}, "
            f"convolution over {self.kernel} tokens"
        )

    @property
    def channels(self) -> int:
        """Values of the convolution: queries, keys and values of all heads."""
        return 2 * self.n_key_heads * self.key_dim + self.width

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: G key heads, N value heads, k and v values of one, K and Y of all; X channels, W kernel.

        M is the channels and the gates; B a strength and a decay for each value head. For one key head, r is the
        number of values of its value heads.
        """
        return {
            "G": self.n_key_heads,
            "N": self.n_value_heads,
            "k": self.key_dim,
            "v": self.value_dim,
            "K": self.n_key_heads * self.key_dim,
            "Y": self.width,
            "X": self.channels,
            "W": self.kernel,
            "M": self.channels + self.width,
            "B": 2 * self.n_value_heads,
            "r": self.width // self.n_key_heads,
        }

    @property
    def state_values(self) -> int:
        """Values that are kept for a text: a matrix for each value head, and the convolution's last inputs."""
        return self.width * self.key_dim + (self.kernel - 1) * self.channels

    @property
    def width(self) -> int:
        """Values of a token before the output projection."""
        return self.n_value_heads * self.value_dim


@dataclass(frozen=True)
class ShortConvolution(Recurrent):
    """A convolution of each channel over the last tokens, behind one gate and in front of another (arXiv 2511.23404).

    Attributes:
        channels: values of the convolution; its input matrix gives so many gates, second gates and values.
        kernel: tokens that it covers, the newest included.
    """

    kind: ClassVar[str] = "a short convolution"

    channels: int
    kernel: int

    @property
    def description(self) -> str:
        """Its sizes in words."""
        return f"a short convolution of {self.channels} channels over {self.kernel} tokens"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: X channels, W kernel."""
        return {"X": self.channels, "W": self.kernel}

    @property
    def state_values(self) -> int:
        """Values that are kept for a text: the convolution's last inputs."""
        return (self.kernel - 1) * self.channels

    @property
    def width(self) -> int:
        """Values of a token before the output projection."""
        return self.channels


@dataclass(frozen=True)
class Mamba2(Recurrent):
    """Mamba-2: each token fades a state and adds an outer product to it, both by its own step (arXiv 2405.21060).

    The input matrix gives the gates of the output, the channels of a convolution and a step for each head. The channels
    are the heads' values, then keys ("B"), then queries ("C"); heads share those of their group, and follow each other.

    Attributes:
        n_heads: heads of values; each has a state and a step.
        n_groups: heads of keys and of queries; they divide the heads. The norm in front of the output matrix is by
            such groups of values too.
        head_dim: values of a head.
        key_dim: values of a key or query ("state size").
        kernel: tokens that the convolution covers, the newest included.
    """

    n_heads: int
    n_groups: int
    head_dim: int
    key_dim: int
    kernel: int

    kind: ClassVar[str] = "Mamba-2"

    @property
    def description(self) -> str:
        """Its sizes in words."""
        return (
            f"{self.n_heads} heads of {self.head_dim} in {self.n_groups} group{'s' * (self.n_groups > 1)}, states of "
            f"{self.key_dim}, convolution over {self.kernel} tokens"
        )

    @property
    def channels(self) -> int:
        """Values of the convolution: those of all heads, and the keys and queries of all groups."""
        return self.width + 2 * self.n_groups * self.key_dim

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: N heads, G groups, v values of a head, k of a key, Y of all heads; X channels, W kernel.

        M is the rows of the input matrix: gates, channels and steps. For one group, g is the values of its heads.
        """
        return {
            "N": self.n_heads,
            "G": self.n_groups,
            "v": self.head_dim,
            "k": self.key_dim,
            "Y": self.width,
            "X": self.channels,
            "W": self.kernel,
            "M": self.width + self.channels + self.n_heads,
            "g": self.width // self.n_groups,
        }

    @property
    def state_values(self) -> int:
        """Values that are kept for a text: a matrix for each head, and the convolution's last inputs."""
        return self.width * self.key_dim + (self.kernel - 1) * self.channels

    @property
    def width(self) -> int:
        """Values of a token before the output projection."""
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class NoMixer(_WithoutCache):
    """The mixer of a layer that is a feed-forward alone, in families whose layers have one of both."""

    kind: ClassVar[str] = "no mixer"

    @property
    def is_recurrent(self) -> bool:
        """False: there is no state."""
        return False

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: none."""
        return {}

    @property
    def state_values(self) -> int:
        """Values that are kept for a text: none."""
        return 0

    @property
    def width(self) -> int:
        """Values of a token before an output projection: none."""
        return 0

    @property
    def description(self) -> str:
        """Its sizes in words: positions do not see each other."""
        return "each position by itself"

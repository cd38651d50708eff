"""The kinds of feed-forwards: routed experts, with or without a shared one beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from compressors.model.description.glu import SWIGLU, Glu
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing

__all__ = ["Dense", "FeedForward", "LostModule", "Routed", "Shared"]


@dataclass(frozen=True)
class LostModule:
    """A module of transformers' layer that no longer adds anything.

    Attributes:
        name: its name inside the layer.
        n_outputs: the number of values that it returns, of which the first is added; 1: that value, not in a tuple.
    """

    name: str
    n_outputs: int = 1


@dataclass(frozen=True)
class Shared:
    """An expert that every token goes through.

    Attributes:
        width: the number of its neurons.
        is_gated: its output is multiplied by the sigmoid of a linear function of its input.
        has_norms: it has norms of its own, in front of it and behind it.
    """

    width: int
    is_gated: bool = False
    has_norms: bool = False

    @property
    def description(self) -> str:
        """The kind and the size in words."""
        norms = " with norms of its own" if self.has_norms else ""
        return f"{'a gated' if self.is_gated else 'a'} shared expert of width {self.width}{norms}"


@dataclass(frozen=True)
class Routed:
    """Experts from which a router chooses some for each token.

    Attributes:
        n_experts: the number of routed experts.
        top_k: the number of experts that each token uses.
        width: the number of neurons of each routed expert.
        routing: the rule by which experts are chosen and weighed.
        glu: the function between an expert's products.
        shared: the expert beside them; None: there is none.
        router_module: the module inside transformers' decoder layer that multiplies its input by the router's matrix,
            its ``weight`` [E, D]; where a family's router does more before that, a module inside of the router.
        experts_module: the module in the layer that is called with (hidden states, chosen experts, weights).
        block: the modules in the layer that go when it loses its experts, mostly one that holds all of them. (It and
            the two names are empty in a description that nothing runs.)
        selection_bias: the name in the layer of the vector that is added to the scores for the choice, if there is one.
        expert_scale: the name in the layer of the factors of the weights, one for each expert, if there are some.
        router_has_norm: the router norms the hidden state by itself, so that it reads other values than the experts.
        latent_size: the number of values that an expert reads and gives, where a matrix makes them of the hidden state,
            and another one a hidden state of them; None: experts read and give hidden states.
    """

    kind: ClassVar[str] = "routed experts"

    n_experts: int
    top_k: int
    width: int
    routing: Routing
    glu: Glu = SWIGLU
    shared: Shared | None = None
    router_module: str = ""
    experts_module: str = ""
    block: tuple[LostModule, ...] = ()
    selection_bias: str | None = None
    expert_scale: str | None = None
    router_has_norm: bool = False
    latent_size: int | None = None

    def __post_init__(self) -> None:
        """Refuses vectors that the rule does not use.

        Raises:
            ValueError: there is one.
        """
        if self.selection_bias is not None and not self.routing.has_selection_bias:
            raise ValueError("the routing adds no selection bias, but the name of one is given")
        if self.expert_scale is not None and not self.routing.has_expert_scale:
            raise ValueError("the routing has no scale of each expert, but the name of one is given")

    @property
    def router_reads_the_same(self) -> bool:
        """True if router and experts read the same values."""
        return not self.router_has_norm and self.latent_size is None

    @property
    def input_roles(self) -> tuple[Role, ...]:
        """The roles of the matrices that an expert's input is multiplied with: gate and up, or up alone."""
        return (Role.EXPERT_GATE, Role.EXPERT_UP) if self.glu.is_gated else (Role.EXPERT_UP,)

    @property
    def input_rows(self) -> int:
        """The rows of these matrices together."""
        return len(self.input_roles) * self.width

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: E experts, F neurons of each, S neurons of the shared expert, I values that experts read."""
        of_latent = {} if self.latent_size is None else {"I": self.latent_size}
        return {"E": self.n_experts, "F": self.width, "S": 0 if self.shared is None else self.shared.width, **of_latent}

    @property
    def n_active(self) -> int:
        """The number of feed-forwards of this width that each token goes through."""
        return self.top_k

    def resized(self, n_experts: int, width: int) -> Routed:
        """Returns the same with other numbers; top-k never exceeds the experts left."""
        return replace(self, n_experts=n_experts, width=width, top_k=min(self.top_k, n_experts))

    @property
    def description(self) -> str:
        """The sizes in words."""
        beside = "" if self.shared is None else f", beside {self.shared.description}"
        of_latent = "" if self.latent_size is None else f" in a space of {self.latent_size} values"
        return f"{self.n_experts} experts of width {self.width}{of_latent}, {self.top_k} for each token{beside}"


@dataclass(frozen=True)
class Dense:
    """One feed-forward that every token goes through."""

    kind: ClassVar[str] = "a dense feed-forward"

    width: int
    glu: Glu = SWIGLU

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: F neurons."""
        return {"F": self.width}

    @property
    def n_active(self) -> int:
        """The number of feed-forwards of this width that each token goes through."""
        return 1

    @property
    def description(self) -> str:
        """The kind and the size in words."""
        return f"a dense feed-forward of width {self.width}"


FeedForward = Routed | Dense
"""Any of the feed-forwards above."""

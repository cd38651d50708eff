"""A model as frozen values: its layers, their mixers, feed-forwards and tensors. A family's file makes them, once.

Letters in names of arrays, here and everywhere:
    L layers   E experts   K experts per token (top-k)   T tokens   D hidden size   F expert width   V vocabulary
    H attention heads   B token blocks   S width of a shared expert

In the shapes of tensors letters stand for these sizes; each mixer's ``sizes`` has its own:

    D  hidden size          V  vocabulary
    E  routed experts       F  neurons of an expert, or of a dense feed-forward     S  neurons of a shared expert
    I  values that an expert reads and gives, where these are not hidden states
    H  heads                h  values of a head
    Q  values of all queries, and P with their gates             K  values of all keys (and of all values)
    in latent attention:
    A  rank of queries      C  rank of keys and values           R  C and the turned part of a key
    U  outputs of the second matrix of keys and values           O  values of all values
    p  values of a head's key that are not turned                v  values of a head's value
    in a gated delta rule:
    G  key heads            N  value heads                       k, v  values of a key, of a value
    K, Y  values of all keys, of all values                      X  channels of the convolution    W  its kernel
    M  X and the gates      B  a strength and a decay for each value head
    r  values of a key head's value heads
    in Mamba-2 the same, but:
    N  heads                G  groups of heads with keys in common     g  values of a group     M  X, gates and steps
    in a short convolution:
    X  channels             W  its kernel
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from compressors.model.description.family import Family
from compressors.model.description.feed_forward import Dense, FeedForward, LostModule, Routed
from compressors.model.description.mixers import Mixer
from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.tensors import Kind, TensorSpec

__all__ = ["NO_MOE", "LayerSpec", "ModelSpec", "MoeSize", "Place"]

Place = tuple[Role, int | None]
"""A tensor's role, and its layer; None outside of the layers."""


@dataclass(frozen=True)
class MoeSize:
    """The experts of one layer."""

    n_experts: int
    expert_width: int
    bases: SharedBases | None = None  # those that experts stand on; None: each has matrices of its own


NO_MOE = MoeSize(0, 0)
"""The size of a layer without experts."""


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
        mixer: the part that lets positions look at earlier ones.
        feed_forward: the part that follows the mixer; None: the layer has lost it, or never had one.
        hidden_size: D.
        tensors: all tensors of the layer, in the order of their roles; one that each expert has stands here once.
        lost_modules: modules of transformers' layer that it has lost.
        residual_scale: multiplies the outputs of mixer and feed-forward before they are added to the hidden state.
        bases: the bases that experts share, which a file may hold in place of these experts' matrices; None: each
            expert has matrices of its own.
    """

    mixer: Mixer
    feed_forward: FeedForward | None
    hidden_size: int
    tensors: tuple[TensorSpec, ...]
    lost_modules: tuple[LostModule, ...] = ()
    residual_scale: float = 1.0
    bases: SharedBases | None = None

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The size that each letter of the tensors' shapes stands for."""
        of_feed_forward = {} if self.feed_forward is None else self.feed_forward.sizes
        return {"D": self.hidden_size, **self.mixer.sizes, **of_feed_forward}

    @cached_property
    def routed(self) -> Routed | None:
        """The routed experts; None if the layer has none."""
        return self.feed_forward if isinstance(self.feed_forward, Routed) else None

    @cached_property
    def moe(self) -> MoeSize:
        """The number and the width of its experts, without their bases; :data:`NO_MOE` if it has none."""
        return NO_MOE if self.routed is None else MoeSize(self.routed.n_experts, self.routed.width)

    @property
    def n_experts(self) -> int:
        """The number of experts; 0 if it has none."""
        return self.moe.n_experts

    @property
    def top_k(self) -> int:
        """Experts of each token; 0 if it has none."""
        return 0 if self.routed is None else self.routed.top_k

    @property
    def expert_width(self) -> int:
        """Neurons of each expert; 0 if it has none."""
        return self.moe.expert_width

    @property
    def expert_size(self) -> int:
        """Values that an expert reads, and as many that it gives: D, unless experts have a space of their own."""
        return self.hidden_size if self.routed is None else self.routed.latent_size or self.hidden_size

    @property
    def expert_input_rows(self) -> int:
        """The rows of the matrices that an expert's input is multiplied with; 0 if it has none."""
        return 0 if self.routed is None else self.routed.input_rows

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The roles of its tensors."""
        return tuple(tensor.role for tensor in self.tensors)

    @cached_property
    def shared_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that are not an expert's."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_per_expert)

    @cached_property
    def expert_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that every expert has."""
        return tuple(tensor for tensor in self.tensors if tensor.is_per_expert)

    def tensor(self, role: Role) -> TensorSpec:
        """The tensor of a role.

        Raises:
            KeyError: the layer has none.
        """
        return self._by_role[role]

    def dimensions(self, tensor: TensorSpec) -> tuple[int, ...]:
        """The shape of a tensor of this layer, or of one expert's tensor if each has one."""
        return self._dimensions.get(tensor.shape) or tuple(self._size(axis) for axis in tensor.shape)

    def n_values(self, tensor: TensorSpec) -> int:
        """The number of values of a tensor, added up over all experts."""
        return prod(self.dimensions(tensor)) * (self.n_experts if tensor.is_per_expert else 1)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return sum(prod(self.dimensions(tensor)) for tensor in self.expert_tensors)

    @property
    def parameters(self) -> int:
        """Parameters of the layer."""
        return sum(self.n_values(tensor) for tensor in self.tensors)

    @property
    def parameters_beside_experts(self) -> int:
        """Parameters of the layer except those of its routed experts."""
        return sum(self.n_values(tensor) for tensor in self.shared_tensors)

    def resized(self, size: MoeSize) -> LayerSpec:
        """The layer with experts of another size, or without a feed-forward; a layer without experts stays as it is."""
        if self.routed is None:
            return self
        if size == NO_MOE:
            kept = tuple(tensor for tensor in self.tensors if not tensor.role.is_feed_forward)
            gone = (tensor for tensor in self.tensors if tensor not in kept and tensor.kind is Kind.NORM)
            norms = (LostModule(tensor.submodule) for tensor in gone)
            return replace(self, feed_forward=None, tensors=kept, lost_modules=(*norms, *self.routed.block))
        return replace(self, feed_forward=self.routed.resized(size.n_experts, size.expert_width), bases=size.bases)

    def _size(self, axis: str) -> int:
        """The size of an axis, which is a letter, a number, or a number times a letter."""
        factor = axis.rstrip(axis[-1]) if axis[-1].isalpha() else axis
        return int(factor or 1) * (self.sizes[axis[-1]] if axis[-1].isalpha() else 1)

    @cached_property
    def _by_role(self) -> Mapping[Role, TensorSpec]:
        return {tensor.role: tensor for tensor in self.tensors}

    @cached_property
    def _dimensions(self) -> Mapping[tuple[str, ...], tuple[int, ...]]:
        """The shapes of the layer's tensors, by their letters: plans ask for them thousands of times."""
        return {tensor.shape: tuple(self._size(axis) for axis in tensor.shape) for tensor in self.tensors}


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model that its computation and its containers depend on, apart from the weights.

    Attributes:
        family: the architecture.
        hidden_size: D.
        vocab_size: V.
        context_length: the number of tokens that files are written for; at most attention's window, if it has one.
        rms_norm_eps: epsilon of the RMS norms.
        tied_embeddings: the head is the embedding.
        tensors: the tensors outside of the layers; a tied head is among them.
        layers: the decoder layers.
        bos_token_id: the token that begins texts; None: there is none.
        eos_token_ids: the tokens that end texts.
        pad_token_id: the token that fills up batches; None: there is none.
        embedding_scale: a factor of the embedding's rows where they enter the first layer.
        logit_divisor: logits are divided by it.
        logit_cap: a limit c of logits x, which become c tanh(x / c); None: there is none.
        mtp: a layer behind the decoder layers that predicts one more token (multi-token prediction), of which nothing
            else depends; None: there is none, or it is left out.
    """

    family: Family
    hidden_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    tied_embeddings: bool
    tensors: tuple[TensorSpec, ...]
    layers: tuple[LayerSpec, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    mtp: LayerSpec | None = None

    @property
    def model_type(self) -> str:
        """The name of the family in ``config.json``."""
        return self.family.model_type

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def blocks(self) -> tuple[LayerSpec, ...]:
        """The layers as files number them: the decoder layers, and behind them the one that predicts one more token."""
        return self.layers if self.mtp is None else (*self.layers, self.mtp)

    @property
    def n_experts(self) -> int:
        """The most experts of any layer."""
        return max(layer.n_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        """The most experts of a token in any layer."""
        return max(layer.top_k for layer in self.layers)

    @property
    def expert_width(self) -> int:
        """The width of the widest experts."""
        return max(layer.expert_width for layer in self.layers)

    @property
    def expert_size(self) -> int:
        """The most values that an expert reads, and gives; D if the model has no experts."""
        return max((layer.expert_size for layer in self.layers if layer.routed is not None), default=self.hidden_size)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of its layers: first those of layers that reach back over all tokens."""
        unlimited_first = sorted(self.layers, key=lambda layer: layer.mixer.window is not None)
        return tuple(dict.fromkeys(rope for layer in unlimited_first if (rope := layer.mixer.rope) is not None))

    @property
    def rope(self) -> Rope | None:
        """The first of :attr:`ropes`; most models have no other. None: no layer turns anything."""
        return next(iter(self.ropes), None)

    @property
    def window(self) -> int | None:
        """Tokens that attention reaches back over in every layer; None: in some layer it reaches back over all."""
        windows = {layer.mixer.window for layer in self.layers}
        return windows.pop() if len(windows) == 1 else None

    @property
    def is_uniform(self) -> bool:
        """True if no layer has lost its feed-forward, and all layers with experts have equal numbers and widths."""
        sizes = {layer.moe for layer in self.blocks if layer.routed is not None}
        return len(sizes) == 1 and not any(layer.lost_modules for layer in self.layers)

    def with_sizes(
        self, sizes: Sequence[MoeSize], sources: Sequence[int] | None = None, mtp: MoeSize | None = None
    ) -> ModelSpec:
        """The model with experts of other sizes.

        Args:
            sizes: the size of the experts in each layer of the result.
            sources: the layer of this model that each comes from; None: the first ones.
            mtp: the size of those in the layer that predicts one more token; None: the result has no such layer.
        """
        kept = range(len(sizes)) if sources is None else sources
        found: dict[tuple[int, MoeSize], LayerSpec] = {}  # layers that are one object stay one, which remembers much
        layers = []
        for source, size in zip(kept, sizes, strict=True):
            layer = self.layers[source]
            if (id(layer), size) not in found:
                found[id(layer), size] = layer.resized(size)
            layers.append(found[id(layer), size])
        block = None if mtp is None or self.mtp is None else self.mtp.resized(mtp)
        return replace(self, layers=tuple(layers), mtp=block)

    def with_experts(self, n_experts: int) -> ModelSpec:
        """The model with another number of experts in every layer that has some."""
        sizes = [replace(layer.moe, n_experts=n_experts) for layer in self.blocks]
        return self.with_sizes(sizes[: self.n_layers], mtp=sizes[-1])

    @property
    def places(self) -> Iterator[tuple[TensorSpec, int | None]]:
        """Yields all tensors with their layer, in the order of files; an expert tensor comes once for each layer."""
        for tensor in self.tensors:
            yield tensor, None
        for index, layer in enumerate(self.layers):
            for tensor in layer.tensors:
                yield tensor, index

    @property
    def file_places(self) -> Iterator[tuple[TensorSpec, int | None]]:
        """Yields :attr:`places`, and those of the layer that predicts one more token, which some files hold too."""
        yield from self.places
        if self.mtp is not None:
            for tensor in self.mtp.tensors:
                yield tensor, self.n_layers

    def tensor(self, role: Role, layer: int | None = None) -> TensorSpec:
        """The tensor of a role.

        Raises:
            KeyError: the model has none there.
        """
        return self._by_role[role] if layer is None else self.blocks[layer].tensor(role)

    def dimensions(self, role: Role, layer: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor, or of one expert's tensor if each has one."""
        if layer is not None:
            return self.blocks[layer].dimensions(self.blocks[layer].tensor(role))
        sizes = {"D": self.hidden_size, "V": self.vocab_size}
        return tuple(sizes[letter] for letter in self.tensor(role).shape)

    @property
    def parameters(self) -> int:
        """The parameters that files hold; tied embeddings count once."""
        written = self.written
        outside = sum(prod(written.dimensions(tensor.role)) for tensor in written.tensors)
        return outside + sum(layer.parameters for layer in written.layers)

    @property
    def described_sizes(self) -> str:
        """The different sizes of layers, for messages: ``16 experts of width 128, 12 experts of width 96``."""
        sizes = (
            f"{size.n_experts} experts of width {size.expert_width}" if size != NO_MOE else "no experts"
            for size in (layer.moe for layer in self.blocks)
        )
        return ", ".join(dict.fromkeys(sizes))

    @cached_property
    def written(self) -> ModelSpec:
        """The model as files hold it: without a tied head, and as the dense counterpart if no layer needs a router.

        No layer needs one if none has more than one expert: every token chooses it, and its weight, a softmax over
        one logit, is 1 whatever the router says.
        """
        tensors = tuple(tensor for tensor in self.tensors if not (tensor.role is Role.HEAD and self.tied_embeddings))
        without_head = replace(self, tensors=tensors)
        dense = self.family.dense
        if dense is None or self.n_experts != 1:
            return without_head
        layers = [layer if layer.routed is None else _dense(layer, dense.tensors) for layer in self.layers]
        return replace(without_head, family=dense.family, layers=tuple(layers))

    @cached_property
    def _by_role(self) -> Mapping[Role, TensorSpec]:
        return {tensor.role: tensor for tensor in self.tensors}


def _dense(layer: LayerSpec, projections: tuple[TensorSpec, ...]) -> LayerSpec:
    """Returns the layer with its only expert as its feed-forward."""
    assert layer.routed is not None
    kept = tuple(tensor for tensor in layer.shared_tensors if tensor.role is not Role.ROUTER)
    feed_forward = Dense(layer.routed.width, layer.routed.glu)
    return replace(layer, feed_forward=feed_forward, tensors=(*kept, *projections))

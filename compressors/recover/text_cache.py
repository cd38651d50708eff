"""Keys, values and states of texts that a streamed model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Rows", "TextCache"]


class TextCache:
    """Keys and values of all layers, texts and positions, in memory that is taken once for each layer.

    For a recurrent layer it holds the states of all texts after the last position. transformers' own caches either copy
    everything for each token, or need a mask over future positions.
    """

    def __init__(self, n_texts: int, n_tokens: int) -> None:
        self._n_texts = n_texts
        self._n_tokens = n_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [B, heads, T, values of a head] each
        self._states: dict[tuple[str, int], torch.Tensor] = {}  # [B, ...] each, by kind and layer
        self._tried: dict[tuple[str, int], torch.Tensor] = {}  # the same of one layer, after rows that may be undone

    def of(self, texts: slice, first_position: int) -> Cache:
        """A cache for transformers' attention, for some texts whose next positions begin at ``first_position``."""
        return cast("Cache", _Part(self, texts, first_position))

    def at(self, texts_n: torch.Tensor, positions_n: torch.Tensor) -> Rows:
        """A cache for rows that are one position each: the text and the position of every row.

        A row may repeat another one; of two rows of a recurrent layer's text, only repetitions are allowed.
        """
        return Rows(self, texts_n, positions_n)

    def settle(self, texts_n: torch.Tensor) -> None:
        """Makes the states that rows left the states of these texts; otherwise :meth:`forget` undoes them."""
        for key, states in self._tried.items():
            self._states[key][texts_n] = states[texts_n]

    def forget(self) -> None:
        """Drops the states that rows left and that were not settled. Call it after each layer."""
        self._tried.clear()

    def tried_states(self, kind: str, layer: int) -> torch.Tensor:
        """The states of all texts after the last rows, which begin as those that are settled."""
        if (kind, layer) not in self._tried:
            self._tried[kind, layer] = self._states[kind, layer].clone()
        return self._tried[kind, layer]

    def arrays(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's arrays, with room for all texts; their heads are like those of the keys and values given."""
        if layer not in self._layers:
            self._layers[layer] = self._room(keys), self._room(values)
        return self._layers[layer]

    def state(self, kind: str, layer: int, texts: slice) -> torch.Tensor:
        """The layer's state of some texts."""
        return self._states[kind, layer][texts]

    def put_state(self, kind: str, layer: int, texts: slice, state: torch.Tensor) -> None:
        """Keeps the layer's state of some texts, with room for all."""
        if (kind, layer) not in self._states:
            self._states[kind, layer] = state.new_empty(self._n_texts, *state.shape[1:])
        self._states[kind, layer][texts] = state

    def _room(self, states_BHth: torch.Tensor) -> torch.Tensor:
        _, n_heads, _, head_dim = states_BHth.shape
        return states_BHth.new_zeros(self._n_texts, n_heads, self._n_tokens, head_dim)


class Rows:
    """The cache of rows that are one position each; implements the methods that transformers' layers call."""

    def __init__(self, cache: TextCache, texts_n: torch.Tensor, positions_n: torch.Tensor) -> None:
        self._cache = cache
        self._texts_n = texts_n
        self._positions_n = positions_n
        self._gathered: dict[tuple[str, int], torch.Tensor] = {}  # states, which a layer may change in place

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_others: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores each row's keys and values, [n, heads, 1, head_dim]; returns those of all positions of its text."""
        arrays = self._cache.arrays(layer, keys, values)
        for array, new in zip(arrays, (keys, values), strict=True):
            array[self._texts_n, :, self._positions_n] = new[:, :, 0]
        return arrays[0][self._texts_n], arrays[1][self._texts_n]

    def get_conv_state(self, layer: int, **_others: int) -> torch.Tensor:
        """The last positions' inputs of a convolution, which it shifts in place."""
        return self._gather(_CONVOLUTION, layer)

    def get_recurrent_state(self, layer: int, **_others: int) -> torch.Tensor:
        """The states before these positions."""
        return self._gather(_RECURRENCE, layer)

    def update_recurrent_state(self, state: torch.Tensor, layer_idx: int) -> None:
        """Takes the states after these positions."""
        self._gathered[_RECURRENCE, layer_idx] = state

    def is_recording_past(self, _layer: int) -> bool:
        """False: transformers takes no position back."""
        return False

    def keep(self) -> None:
        """Keeps the states after these positions as tried ones. Call it after the layer."""
        for key, states in self._gathered.items():
            self._cache.tried_states(*key)[self._texts_n] = states

    def _gather(self, kind: str, layer: int) -> torch.Tensor:
        self._gathered[kind, layer] = self._cache.tried_states(kind, layer)[self._texts_n]
        return self._gathered[kind, layer]


class _Part:
    def __init__(self, cache: TextCache, texts: slice, first_position: int) -> None:
        self._cache = cache
        self._texts = texts
        self._first_position = first_position

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_others: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values of the next positions, [B, heads, t, head_dim]; returns those of all so far."""
        stop = self._first_position + keys.shape[2]
        all_keys, all_values = (array[self._texts] for array in self._cache.arrays(layer, keys, values))
        all_keys[:, :, self._first_position : stop] = keys
        all_values[:, :, self._first_position : stop] = values
        return all_keys[:, :, :stop], all_values[:, :, :stop]

    def get_conv_state(self, layer: int, **_others: int) -> torch.Tensor | None:
        """The last positions' inputs of a convolution, which it shifts in place; None before the first position."""
        return self._cache.state(_CONVOLUTION, layer, self._texts) if self._first_position else None

    def get_recurrent_state(self, layer: int, **_others: int) -> torch.Tensor | None:
        """The state after the last position; None before the first one."""
        return self._cache.state(_RECURRENCE, layer, self._texts) if self._first_position else None

    def update_conv_state(self, inputs_BCt: torch.Tensor, layer: int, *, conv_kernel_size: int) -> torch.Tensor:
        """Keeps the inputs that the next position reaches back to; returns all inputs of the first positions."""
        n_kept = max(conv_kernel_size - 1, 1)
        last = functional.pad(inputs_BCt, (n_kept, 0))[..., -n_kept:]
        self._cache.put_state(_CONVOLUTION, layer, self._texts, last)
        return inputs_BCt

    def update_recurrent_state(self, state: torch.Tensor, layer_idx: int) -> None:
        """Keeps the state after these positions."""
        self._cache.put_state(_RECURRENCE, layer_idx, self._texts, state)

    def is_recording_past(self, _layer: int) -> bool:
        """False: no position is ever taken back."""
        return False


_CONVOLUTION, _RECURRENCE = "convolution", "recurrence"

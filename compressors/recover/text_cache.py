"""Keys, values and states of texts that a streamed model writes.

Letters: B texts, T positions of a text, n rows, each one position of a text, h values of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from compressors.model.description.spec import ModelSpec
from compressors.model.running.hidden_states import HiddenStates

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Rows", "TextCache", "cache_bytes"]


def cache_bytes(
    spec: ModelSpec, n_texts: int, n_tokens: int, dtype: torch.dtype = torch.float32, n_in_memory: int | None = None
) -> int:
    """Bytes of memory for a :class:`TextCache`, with or without files, and for one layer's hidden states."""
    of_layers = [layer.mixer.cached_values for layer in spec.layers if layer.mixer.cached_values]
    per_token = spec.hidden_size + sum(of_layers[:n_in_memory])
    if n_in_memory is not None:
        per_token += 2 * max(of_layers[n_in_memory:], default=0)  # one runs, and reading it copies it
    states = sum(layer.mixer.state_values for layer in spec.layers)
    return n_texts * (n_tokens * per_token * dtype.itemsize + states * torch.float32.itemsize)


class TextCache:
    """Keys and values of all layers, texts and positions, in arrays that are made once for each layer.

    For a recurrent layer it holds the states of all texts after the last position. transformers' own caches either copy
    everything for each token, or need a mask over future positions.

    Args:
        n_texts: B.
        n_tokens: T.
        spill: a folder for unnamed files with the keys and values of layers that do not run; None: all lie in memory.
        n_in_memory: layers whose keys and values stay in memory all the same.
    """

    def __init__(self, n_texts: int, n_tokens: int, spill: Path | None = None, n_in_memory: int = 0) -> None:
        self._n_texts = n_texts
        self._n_tokens = n_tokens
        self._spill = spill
        self._n_in_memory = n_in_memory
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [B, heads, T, h] each
        self._files: dict[int, _LayerFiles] = {}
        self._new_BT = torch.zeros(n_texts, n_tokens, dtype=torch.bool)  # positions that a layer's file does not have
        self._sources_B, self._n_repeated = torch.arange(n_texts), 0  # see repeat
        self._states: dict[tuple[str, int], torch.Tensor] = {}  # [B, ...] each, by kind and layer
        self._tried: dict[tuple[str, int], torch.Tensor] = {}  # the same of one layer, after rows that may be undone

    def of(self, texts: slice | torch.Tensor, first_position: int) -> Cache:
        """A cache for transformers' attention, for some texts whose next positions begin at ``first_position``."""
        return cast("Cache", _Part(self, texts, first_position))

    def at(self, texts_n: torch.Tensor, positions_n: torch.Tensor, *, gathers: bool = True) -> Rows:
        """A cache for rows that are one position each: the text and the position of every row.

        A row may repeat another one; of two rows of a recurrent layer's text, only repetitions are allowed.

        Args:
            texts_n: the text of each row, int64.
            positions_n: the position of each row, int64.
            gathers: attention gets keys and values for every row, copied side by side; False: those of all texts.
        """
        return Rows(self, texts_n, positions_n, gathers=gathers)

    def repeat(self, layer: int, sources_B: torch.Tensor, n_positions: int) -> None:
        """Gives each text of a layer what the text with the number in ``sources_B`` has, which may be itself.

        Files hold these first positions of the sources alone.
        """
        self._sources_B, self._n_repeated = sources_B, n_positions
        self._repeat(self._layers.get(layer, ()))
        texts_n = self._repeating()
        for (_, of_layer), states in self._states.items():
            if of_layer == layer:
                states[texts_n] = states[sources_B[texts_n]]

    def _repeat(self, arrays: Sequence[torch.Tensor]) -> None:
        texts_n = self._repeating()
        for array in arrays:
            array[texts_n, :, : self._n_repeated] = array[self._sources_B[texts_n], :, : self._n_repeated]

    def _repeating(self) -> torch.Tensor:
        """The texts that have another one's first positions."""
        return (self._sources_B != torch.arange(self._n_texts)).nonzero()[:, 0]

    def settle(self, texts_n: torch.Tensor) -> None:
        """Makes the states that rows left the states of these texts; otherwise :meth:`leave` undoes them."""
        for key, states in self._tried.items():
            self._states[key][texts_n] = states[texts_n]

    def leave(self, layer: int) -> None:
        """Drops the states that rows left and that were not settled. Call it after each layer."""
        self._tried.clear()
        if layer in self._files:
            self._files[layer].write(self._layers.pop(layer), self._new_BT)
        self._new_BT[:] = False

    def tried_states(self, kind: str, layer: int) -> torch.Tensor:
        """The states of all texts after the last rows, which begin as those that are settled."""
        if (kind, layer) not in self._tried:
            self._tried[kind, layer] = self._states[kind, layer].clone()
        return self._tried[kind, layer]

    def store(
        self, layer: int, texts: slice | torch.Tensor, positions: slice | torch.Tensor, new: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts keys and values of some positions into the layer's arrays, and returns those: [B, heads, T, h] each.

        Args:
            layer: the layer's number.
            texts: the texts that they belong to, or the text of each row.
            positions: the positions of each text, or the one of each row.
            new: keys and values, [b, heads, t, h] or, of rows, [n, heads, h].
        """
        if layer not in self._layers:
            self._layers[layer] = self._arrays(layer, new)
        self._new_BT[texts, positions] = True
        for array, values in zip(self._layers[layer], new, strict=True):
            array[texts, :, positions] = values
        return self._layers[layer]

    def _arrays(self, layer: int, new: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's arrays from its files, or new ones with room for all texts and positions."""
        if layer in self._files:
            arrays = self._files[layer].read()
            self._repeat(arrays)
            return arrays
        keys, values = (one.new_zeros(self._n_texts, one.shape[1], self._n_tokens, one.shape[-1]) for one in new)
        if self._spill is not None and len(self._layers) >= self._n_in_memory:
            self._files[layer] = _LayerFiles(keys, values, self._spill)
        return keys, values

    def state(self, kind: str, layer: int, texts: slice | torch.Tensor) -> torch.Tensor:
        """The layer's state of some texts."""
        return self._states[kind, layer][texts]

    def put_state(self, kind: str, layer: int, texts: slice | torch.Tensor, state: torch.Tensor) -> None:
        """Keeps the layer's state of some texts, with room for all."""
        if (kind, layer) not in self._states:
            self._states[kind, layer] = state.new_empty(self._n_texts, *state.shape[1:])
        self._states[kind, layer][texts] = state


class _LayerFiles:
    """Keys and values of a layer on the disk, a row for each position of each text."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, folder: Path) -> None:
        self._shapes = keys.shape, values.shape
        self._rows = [
            HiddenStates((n_texts * n_tokens, n_heads, head_dim), keys.dtype, folder)
            for n_texts, n_heads, n_tokens, head_dim in self._shapes
        ]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values: [B, heads, T, h] each."""
        keys, values = (
            rows.read(slice(0, len(rows))).view(n_texts, n_tokens, n_heads, head_dim).transpose(1, 2).contiguous()
            for rows, (n_texts, n_heads, n_tokens, head_dim) in zip(self._rows, self._shapes, strict=True)
        )
        return keys, values

    def write(self, arrays: tuple[torch.Tensor, torch.Tensor], new_BT: torch.Tensor) -> None:
        """Writes the keys and values of each text's new positions, and of those between them."""
        n_tokens = new_BT.shape[1]
        for text in new_BT.any(1).nonzero()[:, 0].tolist():
            positions = new_BT[text].nonzero()
            first, stop = int(positions[0]), int(positions[-1]) + 1
            for rows, array in zip(self._rows, arrays, strict=True):
                places = slice(text * n_tokens + first, text * n_tokens + stop)
                rows.write(places, array[text, :, first:stop].transpose(0, 1))


class Rows:
    """The cache of rows that are one position each; implements the methods that transformers' layers call."""

    def __init__(self, cache: TextCache, texts_n: torch.Tensor, positions_n: torch.Tensor, *, gathers: bool) -> None:
        self._cache = cache
        self._texts_n = texts_n
        self._positions_n = positions_n
        self._gathers = gathers
        self._gathered: dict[tuple[str, int], torch.Tensor] = {}  # states, which a layer may change in place

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_others: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores each row's keys and values, [n, heads, 1, head_dim].

        Returns those of all positions of each row's text, or of all positions of all texts.
        """
        new = keys[:, :, 0], values[:, :, 0]
        all_keys, all_values = self._cache.store(layer, self._texts_n, self._positions_n, new)
        return (all_keys[self._texts_n], all_values[self._texts_n]) if self._gathers else (all_keys, all_values)

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
    def __init__(self, cache: TextCache, texts: slice | torch.Tensor, first_position: int) -> None:
        self._cache = cache
        self._texts = texts
        self._first_position = first_position

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_others: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values of the next positions, [B, heads, t, head_dim]; returns those of all so far."""
        stop = self._first_position + keys.shape[2]
        positions = slice(self._first_position, stop)
        all_keys, all_values = self._cache.store(layer, self._texts, positions, (keys, values))
        return all_keys[self._texts, :, :stop], all_values[self._texts, :, :stop]

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

"""The changes that llama.cpp's converters make to a tensor's values, each with its inverse.

A file holds a tensor as one part, or as several. A part is a selection of the tensor's values in another order, or with
a function applied to each. Every class gives the values it takes as views of the tensor: writing reads through them,
and reading writes through them, so the inverse of an order never has to be written down.

Transforms of large matrices work on some whole rows at a time, so that no such matrix is held at once; all others take
the whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "SAME",
    "Chain",
    "EverySecond",
    "HeadMatrices",
    "InterleaveRotary",
    "NegativeExponential",
    "PlusOne",
    "Reshaped",
    "Squeezed",
    "TiledHeads",
    "Transform",
    "UngroupedRows",
]

Sizes = Mapping[str, int]
"""The sizes of a layer by letter (:mod:`compressors.model.description.spec`)."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """Changes nothing. The other transforms override some of its methods."""

    @property
    def keeps_inputs(self) -> bool:
        """True if the rows of the part are multiplied with the same values, in the same order, as the tensor's."""
        return True

    def rows_together(self, sizes: Sizes) -> int | None:
        """The number of neighbouring rows that have to be transformed together; None: all of them."""
        return None

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """Returns the shape of the part that is made of a tensor of this shape."""
        return shape

    def write(self, values: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns the part as llama.cpp has it.

        Args:
            values: the tensor, or some of its rows, a multiple of :meth:`rows_together`.
            sizes: the layer's.
        """
        import torch

        views = self._views(values, sizes)
        joined = views[0] if len(views) == 1 else torch.cat([view.flatten() for view in views])
        return self._written(joined).reshape(self.shape(tuple(values.shape), sizes))

    def read(self, part: torch.Tensor, into: torch.Tensor, sizes: Sizes) -> None:
        """Undoes :meth:`write`: puts the values of the part into their places in the tensor.

        Args:
            part: the part, or its rows that :meth:`write` makes of some of the tensor's.
            into: the tensor, or some of its rows; values of other parts stay as they are.
            sizes: the layer's.
        """
        flat = part.flatten()
        views = self._views(into, sizes)
        for view, values in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(self._read(values).view(view.shape))

    def inputs(self, values_N: torch.Tensor, sizes: Sizes) -> torch.Tensor | None:
        """Returns values for each input feature in the order of the part's rows.

        None: the part's rows run along something else than the tensor's inputs.
        """
        return values_N if self.keeps_inputs else None

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        """The values of the part, as views of the tensor that follow each other."""
        return (values,)

    def _written(self, values: torch.Tensor) -> torch.Tensor:
        """Applies the function of each value."""
        return values

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`_written`."""
        return values


@dataclass(frozen=True)
class Same(Transform):
    """Changes nothing, row by row."""

    def rows_together(self, sizes: Sizes) -> int:
        """1: any row by itself."""
        return 1


SAME = Same()


@dataclass(frozen=True)
class InterleaveRotary(Transform):
    """Puts the rows of each head that one rotation mixes, i and i + head_dim / 2, side by side.

    ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py`` does the same.

    Attributes:
        head: the letter of the head's size.
    """

    head: str = "h"

    def rows_together(self, sizes: Sizes) -> int:
        """The rows of a head."""
        return sizes[self.head]

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        return (values.unflatten(0, (-1, 2, sizes[self.head] // 2)).transpose(1, 2),)


@dataclass(frozen=True)
class UngroupedRows(Transform):
    """Takes some segments of the rows of each group: all groups' rows of one segment, then those of the next.

    Attributes:
        groups: the letter of the number of groups; None: the rows are one group.
        segments: the letters of the segments' rows, in the order in which each group has them.
        taken: the segments that belong to this part.
    """

    groups: str | None
    segments: tuple[str, ...]
    taken: tuple[int, ...]

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The taken rows of all groups."""
        return (self._n_groups(sizes) * sum(sizes[self.segments[place]] for place in self.taken), *shape[1:])

    def _n_groups(self, sizes: Sizes) -> int:
        return 1 if self.groups is None else sizes[self.groups]

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        segments = _segments(values, sizes, self._n_groups(sizes), self.segments)
        return tuple(segments[place] for place in self.taken)


@dataclass(frozen=True)
class HeadMatrices(Transform):
    """Takes one segment of the rows of each head, as a matrix for each head: [heads, rows, columns].

    Attributes:
        heads: the letter of the number of heads.
        segments: the letters of the segments' rows, in the order in which each head has them.
        taken: the segment that belongs to this part.
        is_transposed: the matrix of each head is transposed.
    """

    heads: str
    segments: tuple[str, ...]
    taken: int
    is_transposed: bool = False

    @property
    def keeps_inputs(self) -> bool:
        """True unless the matrices are transposed: their rows then run along the tensor's outputs."""
        return not self.is_transposed

    def rows_of(self, head: int, sizes: Sizes) -> slice:
        """The rows of the tensor that a head's matrix is made of."""
        lengths = [sizes[letter] for letter in self.segments]
        first = head * sum(lengths) + sum(lengths[: self.taken])
        return slice(first, first + lengths[self.taken])

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """A matrix for each head."""
        matrix = (sizes[self.segments[self.taken]], *shape[1:])
        return (sizes[self.heads], *(reversed(matrix) if self.is_transposed else matrix))

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        matrices = _segments(values, sizes, sizes[self.heads], self.segments)[self.taken]
        return (matrices.transpose(1, 2) if self.is_transposed else matrices,)


def _segments(values: torch.Tensor, sizes: Sizes, n_groups: int, letters: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """The segments of rows that each group has: views of the tensor, [groups, rows of the segment, ...]."""
    grouped = values.unflatten(0, (n_groups, -1))
    segments: tuple[torch.Tensor, ...] = grouped.split([sizes[letter] for letter in letters], dim=1)
    return segments


@dataclass(frozen=True)
class EverySecond(Transform):
    """Takes every second value along an axis, for example the gates where gates and ups alternate.

    Attributes:
        first: the first value that belongs to this part: 0 or 1.
        axis: the axis; only along the first one are the part's inputs the tensor's.
    """

    first: int
    axis: int = -1

    @property
    def keeps_inputs(self) -> bool:
        """True if rows are taken."""
        return self.axis == 0

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The shape with half of the axis."""
        halved = list(shape)
        halved[self.axis] //= 2
        return tuple(halved)

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        axis = self.axis % values.dim()
        return (values.unflatten(axis, (-1, 2)).select(axis + 1, self.first),)


@dataclass(frozen=True)
class TiledHeads(Transform):
    """Brings value heads from the order of their key heads into ggml's, which repeats all key heads in turn.

    The heads [key heads, values of each] become [values of each, key heads] (``_LinearAttentionVReorderBase`` in
    llama.cpp's ``conversion/qwen.py``).

    Attributes:
        key_heads: the letter of the number of key heads.
        value_heads: the letter of the number of value heads.
        head: the letter of a head's values; None: a head has one value.
        before: letters of values in front of the heads, which stay where they are.
        of_inputs: the heads lie along the columns, not along the rows.
    """

    key_heads: str
    value_heads: str
    head: str | None = None
    before: tuple[str, ...] = ()
    of_inputs: bool = False

    @property
    def keeps_inputs(self) -> bool:
        """True if it is the rows that are put into another order."""
        return not self.of_inputs

    def inputs(self, values_N: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns the values in the order of the part's columns."""
        return self._tiled(values_N, sizes, axis=0).flatten() if self.of_inputs else values_N

    def _views(self, values: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        if self.of_inputs:
            return (self._tiled(values, sizes, axis=1),)
        n_before = sum(sizes[letter] for letter in self.before)
        heads = self._tiled(values[n_before:], sizes, axis=0)
        return (values[:n_before], heads) if n_before else (heads,)

    def _tiled(self, values: torch.Tensor, sizes: Sizes, axis: int) -> torch.Tensor:
        n_keys = sizes[self.key_heads]
        counts = (n_keys, sizes[self.value_heads] // n_keys, 1 if self.head is None else sizes[self.head])
        heads: torch.Tensor = values.unflatten(axis, counts)
        return heads.transpose(axis, axis + 1)


@dataclass(frozen=True)
class Squeezed(Transform):
    """Leaves out the axes of one value, such as the input channel of a convolution by channel."""

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The shape without these axes."""
        return tuple(size for size in shape if size != 1)


@dataclass(frozen=True)
class Reshaped(Transform):
    """Gives a vector another shape, such as a row for each group of values.

    Attributes:
        axes: the letters of its sizes, or numbers.
    """

    axes: tuple[str, ...]

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The other shape."""
        return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class PlusOne(Transform):
    """Adds 1 in float32: to the scales of a norm that multiplies by 1 + w."""

    def _written(self, values: torch.Tensor) -> torch.Tensor:
        return values.float() + 1

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        return values - 1


@dataclass(frozen=True)
class NegativeExponential(Transform):
    """Replaces each value x by -exp(x) in float32: a state's decay, whose logarithm is stored."""

    def _written(self, values: torch.Tensor) -> torch.Tensor:
        return -values.float().exp()

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        return (-values).log()


@dataclass(frozen=True)
class Chain(Transform):
    """Applies one transform after another.

    Attributes:
        steps: the transforms, the first one first.
    """

    steps: tuple[Transform, ...]

    @property
    def keeps_inputs(self) -> bool:
        """True if all steps do."""
        return all(step.keeps_inputs for step in self.steps)

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The shape after the last step."""
        return self._shapes(shape, sizes)[-1]

    def write(self, values: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns the result of the last step."""
        for step in self.steps:
            values = step.write(values, sizes)
        return values

    def read(self, part: torch.Tensor, into: torch.Tensor, sizes: Sizes) -> None:
        """Undoes the steps, the last one first."""
        shapes = self._shapes(tuple(into.shape), sizes)
        for step, shape in zip(reversed(self.steps[1:]), reversed(shapes[1:-1]), strict=True):
            before = part.new_empty(shape)
            step.read(part, before, sizes)
            part = before
        self.steps[0].read(part, into, sizes)

    def inputs(self, values_N: torch.Tensor, sizes: Sizes) -> torch.Tensor | None:
        """Returns the values in the order of the last step's rows."""
        found: torch.Tensor | None = values_N
        for step in self.steps:
            found = None if found is None else step.inputs(found, sizes)
        return found

    def _shapes(self, shape: Shape, sizes: Sizes) -> list[Shape]:
        """The shapes before the first step and after each."""
        return list(accumulate(self.steps, lambda before, step: step.shape(before, sizes), initial=shape))

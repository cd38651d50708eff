"""The original model as everything else sees it: its description, its tensors by role, and the files that go with it.

Whoever opens a model gets a :class:`Source` (:func:`compressors.model.sources.opening.open_source`), and asks it for
tensors and settings; how they lie on disk is known to the class that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compressors.model.description.family import Family
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.storage_type import StorageType

if TYPE_CHECKING:
    import torch

__all__ = ["Origin", "Source"]


class Origin(Protocol):
    """A model apart from its weights: enough to describe and to size the files that are made of it."""

    @property
    def path(self) -> Path:
        """The place of the model, a folder or a file: for messages, for the model's name, and to open it again."""

    @property
    def spec(self) -> ModelSpec:
        """The description."""

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and, where there are such, ``generation_config.json``, model card and licence.

        Files that are written get copies of them. Weights need not be there, and of ``config.json`` no more than the
        special tokens that ``generation_config.json`` does not name.
        """


class Source(Origin, Protocol):
    """A model with its weights, which are read when they are asked for. A tied head is the embedding."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings by transformers' names, as ``config.json`` has them; nobody changes the mapping."""

    @property
    def config_path(self) -> Path:
        """The file that the settings are from, for messages."""

    @property
    def family(self) -> Family:
        """The architecture."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""

    @property
    def stored_as(self) -> str | None:
        """The way in which the files hold quantized weights; None: they hold none."""

    @property
    def n_bytes(self) -> int:
        """Size in bytes of all weights in storage dtype."""

    @property
    def parts_read_past(self) -> Mapping[str, int]:
        """Parts of the files that are no part of the model, in words, each with its number of tensors."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Oddities of the files that do not prevent reading them: sentences without a full stop."""

    @property
    def storage_type(self) -> StorageType:
        """The format of the experts' values."""

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch's dtype."""

    def dtype_of(self, role: Role, layer: int | None = None) -> torch.dtype:
        """Storage dtype of a tensor that is not an expert's."""

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role that is not an expert's, in storage dtype."""

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading all others where it is large."""

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous, with one expert's gate [F, D], up [F, D] or down [D, F] projection."""

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        """ggml's types of a tensor's blocks, of each expert's where it is theirs: one for each part in a GGUF file.

        Empty where the files hold it in another way. A part that is written in its type again loses nothing, and its
        bytes are those of :meth:`stored_rows`.
        """

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        """Rows of a part in its type of :meth:`stored_types`, uint8 [rows, bytes].

        Args:
            role: the role of the tensor.
            layer: its layer.
            part: the number of the part.
            rows: the rows as a GGUF file has them, counted from the expert's first one.
            expert: the expert; None: the tensor is no expert's.
        """

    def identity(self) -> str:
        """A SHA-256 that is equal for equal settings and equal headers of the weights."""

"""A GGUF file as a source: its description from the metadata, its tensors dequantized, its blocks as they are stored.

The settings are turned back into those of ``config.json`` by the family (``GgufFamily.settings``), whose ordinary
reading then makes the description; and the keys that the family would write for that are compared with the file's, so
that nothing is guessed. Values are those that ggml's kernels give, float32 where blocks are quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.reading import read_spec
from compressors.model.description.family import Family, GgufValue
from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.registry import families_of_architecture, supported_families
from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufEntry, GgufFile
from compressors.model.files.json_file import read_json
from compressors.model.files.storage_type import StorageType
from compressors.model.names import shown
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.gguf_folder import folder_of, not_carried_over
from compressors.model.sources.gguf_settings import gguf_setting_symptoms

if TYPE_CHECKING:
    import torch

__all__ = ["GgufSource"]

_T = GGMLQuantizationType
_FLOATS = {_T.F32: StorageType.F32, _T.F16: StorageType.F16, _T.BF16: StorageType.BF16}
_MTP = "nextn_predict_layers"


class GgufSource:
    """Implements :class:`~compressors.model.sources.source.Source`; opening reads headers alone.

    Args:
        path: the file, or the first part of a model that was split.

    Raises:
        InputError: a file is missing, truncated or not GGUF, or lacks a tensor or a setting.
        UnsupportedError: the family is unknown, or a setting or a tensor is one that cannot be represented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self._metadata = dict(self._file.metadata)
        self._architecture = str(self._metadata.get("general.architecture", ""))
        config = self._turned_back()
        self.tokenizer_folder = folder_of(self._file, config)
        self.spec: ModelSpec = self._read_spec()
        self.config: Mapping[str, Any] = read_json(self.config_path)
        self._refuse_other_settings()
        self._weights = GgufWeights(path, self.spec, self._file)
        self._refuse_unclaimed()

    @property
    def config_path(self) -> Path:
        """The file of the settings, which was made of the metadata."""
        return self.tokenizer_folder / "config.json"

    @property
    def family(self) -> Family:
        """The architecture."""
        return self.spec.family

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all parts of it."""
        return self._file.files

    @property
    def stored_as(self) -> str | None:
        """The types of quantized blocks; None: the file holds none."""
        names = sorted({entry.ggml_type.name for entry in self._entries() if entry.ggml_type not in _FLOATS})
        return f"blocks of {', '.join(names)}" if names else None

    @property
    def n_bytes(self) -> int:
        """Size in bytes of all weights in storage dtype."""
        return sum(prod(entry.shape) * _storage_type(entry.ggml_type).itemsize for entry in self._entries())

    @property
    def parts_read_past(self) -> Mapping[str, int]:
        """The layers for predicting several tokens at once, where there are some, with the number of their tensors."""
        n_tensors = sum(self._is_of_mtp(name) for name in self._file.tensors)
        return {MTP_PART: n_tensors} if n_tensors else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Metadata that new files do not repeat."""
        keys = not_carried_over(self._file, self._architecture)
        return (f"metadata that new files do not have: {', '.join(map(shown, keys))}",) if keys else ()

    @property
    def storage_type(self) -> StorageType:
        """The type of the experts' values: float32, unless all are stored in one type of floats."""
        found = {
            self._type_of(tensor.role, index)
            for index, layer in enumerate(self.spec.layers)
            for tensor in layer.expert_tensors
        }
        return found.pop() if len(found) == 1 else StorageType.F32

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch's dtype."""
        return self.storage_type.dtype

    def dtype_of(self, role: Role, layer: int | None = None) -> torch.dtype:
        """The dtype of a tensor's values: float32, unless all its parts are stored in one type of floats."""
        return self._type_of(role, layer).dtype

    def _type_of(self, role: Role, layer: int | None) -> StorageType:
        found = {_storage_type(ggml_type) for ggml_type in self.stored_types(self._role(role), layer)}
        return found.pop() if len(found) == 1 else StorageType.F32

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role that is not an expert's; a tied head is the embedding."""
        return self._weights.tensor(self._role(role), layer).to(self.dtype_of(role, layer))

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`."""
        return self._weights.rows(self._role(role), layer, rows).to(self.dtype_of(role, layer))

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous, with one expert's projection."""
        import torch

        if out.dtype == torch.float32:
            self._weights.read_expert(role, layer, expert, out)
            return
        values = torch.empty(out.shape)
        self._weights.read_expert(role, layer, expert, values)
        out.copy_(values)

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        """The types of a tensor's parts."""
        return self._weights.stored_types(self._role(role), layer)

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        """Rows of a part as the file has them."""
        return self._weights.stored_rows(self._role(role), layer, part, rows, expert)

    def identity(self) -> str:
        """SHA-256 over the headers and sizes of all parts."""
        return self._file.header_digest()

    def _role(self, role: Role) -> Role:
        return Role.TOKEN_EMBEDDING if role is Role.HEAD and self.spec.tied_embeddings else role

    def _entries(self) -> Iterator[GgufEntry]:
        """The tensors of the model."""
        claimed = self._weights.claimed()
        return (entry for name, entry in self._file.tensors.items() if name in claimed)

    def _turned_back(self) -> dict[str, Any]:
        """The settings by transformers' names.

        Raises:
            InputError: a setting is missing, or of the wrong type.
            UnsupportedError: no family reads the file.
        """
        shapes = {name: entry.shape for name, entry in self._file.tensors.items()}
        keys = GgufKeys(self.path, self._architecture, self._metadata, shapes, self._vector)
        for family in families_of_architecture(self._architecture):
            assert family.gguf.settings is not None, "only such families are asked"
            settings = family.gguf.settings(keys)
            if settings is not None:
                names = {"architectures": [family.architecture], "model_type": family.model_type}
                return {**names, **settings}
        if not keys.get("expert_count"):
            raise UnsupportedError(
                f"{self.path}: its architecture {shown(self._architecture)} has no experts here (expert_count); this "
                "tool compresses MoE models"
            )
        raise UnsupportedError(
            f"{self.path}: GGUF files of the architecture {shown(self._architecture)} cannot be read; those that can "
            f"are {', '.join(_readable())}: give the original checkpoint"
        )

    def _read_spec(self) -> ModelSpec:
        """The description, by the family's ordinary reading.

        Raises:
            InputError: a setting is wrong; the message names this file.
            UnsupportedError: a setting is one that cannot be represented.
        """
        try:
            return read_spec(self.tokenizer_folder)
        except InputError as error:
            said = str(error).replace(f"{self.config_path}: ", "").replace(str(self.config_path), "it")
            raise type(error)(f"{self.path}: its metadata, as settings of a config.json, are wrong: {said}") from None

    def _vector(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor of one axis."""
        entry = self._file.tensors[name]
        values: npt.NDArray[np.float32] = dequantize_rows(
            self._file.read_rows(entry, 0, 1), entry.ggml_type, entry.shape[-1]
        )
        return values.reshape(-1)

    def _refuse_other_settings(self) -> None:
        """Refuses a file whose keys are not those of the model that was read from them."""
        symptoms = gguf_setting_symptoms(self._without_mtp(), self.spec)
        refusal = self.family.gguf.refusal(self.spec)
        if symptoms:
            raise UnsupportedError(
                f"{self.path} cannot be turned back into a {self.family.architecture}: {symptoms[0]}; give the "
                "original checkpoint"
            )
        if refusal is not None:
            raise UnsupportedError(f"{self.path}: llama.cpp could not run what it says: its {refusal}")

    def _without_mtp(self) -> dict[str, GgufValue]:
        """The metadata as if the file had no layers for predicting several tokens at once."""
        prefix, n_mtp = f"{self._architecture}.", self._n_mtp()
        if not n_mtp:
            return self._metadata
        n_layers = self.spec.n_layers
        found: dict[str, GgufValue] = {
            key: value[:n_layers] if isinstance(value, tuple) and len(value) == n_layers + n_mtp else value
            for key, value in self._metadata.items()
        }
        return {**found, f"{prefix}block_count": n_layers, f"{prefix}{_MTP}": 0}

    def _n_mtp(self) -> int:
        n_mtp = self._metadata.get(f"{self._architecture}.{_MTP}", 0)
        return n_mtp if isinstance(n_mtp, int) else 0

    def _is_of_mtp(self, name: str) -> bool:
        block, _, rest = name.removeprefix("blk.").partition(".")
        is_behind = block.isdecimal() and int(block) >= self.spec.n_layers
        return bool(self._n_mtp()) and name.startswith("blk.") and bool(rest) and is_behind

    def _refuse_unclaimed(self) -> None:
        """Refuses the first tensor that the description does not know."""
        factors = gguf_rope_of(self.spec).factors
        claimed = self._weights.claimed() | {name for name in factors if self._has_same(name, factors[name])}
        name = next((name for name in self._file.tensors if name not in claimed and not self._is_of_mtp(name)), None)
        if name is not None:
            raise UnsupportedError(
                f"{self.path}: tensor {shown(name)} belongs to no part of a {self.family.architecture} with this "
                "metadata; without it another model would be read: give the original checkpoint"
            )

    def _has_same(self, name: str, factors: Sequence[float]) -> bool:
        """True if the file has these factors of the rotary embedding."""
        if name not in self._file.tensors or self._file.tensors[name].shape != (len(factors),):
            return False
        return np.allclose(self._vector(name), np.array(factors, dtype=np.float32), rtol=1e-5, atol=0)


def _storage_type(ggml_type: GGMLQuantizationType) -> StorageType:
    """The smallest type that holds all values of a type."""
    return _FLOATS.get(ggml_type, StorageType.F32)


def _readable() -> list[str]:
    """The architectures that files may have."""
    families = supported_families().values()
    return sorted({family.gguf.architecture for family in families if family.gguf.settings is not None})

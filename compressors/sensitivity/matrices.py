"""Sensitivities: how much the output suffers from errors in each matrix. They are kept in files.

To second order the divergence that errors dW of a matrix cause is 1/2 E[(sum_oj G_o dW_oj x_j)^2], with x the inputs
of a token and G the gradient of the log-probability of a token that the model itself draws (the Fisher information).
For independent errors this is 1/2 sum_oj E[G_o^2 x_j^2] dW_oj^2, and the two factors are separated: quantized types are
judged by a vector over output rows and one over input columns.

Letters beside those of :mod:`compressors.model.description.spec`: M matrices of a tensor (experts; one otherwise), P
products that are summed (two for a tied embedding, one otherwise), O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressors.model.description.roles import Role
from compressors.model.errors import InputError

__all__ = ["LayerSensitivities", "MatrixSensitivity", "Sensitivities", "VocabularySensitivities"]


@dataclass(frozen=True)
class MatrixSensitivity:
    """The weight of each squared error of a tensor: sum_p rows[m, p, o] columns[m, p, i]."""

    rows_MPO: torch.Tensor  # float32: E[G_o^2] over all tokens, including those that did not choose the expert
    columns_MPI: torch.Tensor  # float32: E[x_i^2] over the tokens that chose it
    routed_P: tuple[bool, ...] = (True,)  # True if routers see the product's errors; no router follows the head

    def weights(self, matrix: int, rows: torch.Tensor, *, routed_only: bool = False) -> torch.Tensor:
        """The weights of some rows' squared errors, or of the part of them that routers see: float32 [rows, I]."""
        counted = [product for product, routed in enumerate(self.routed_P) if routed or not routed_only]
        return self.rows_MPO[matrix, counted][:, rows].T @ self.columns_MPI[matrix, counted]

    @property
    def row_weights_MO(self) -> torch.Tensor:
        """The sum of each row's weights: float64 [M, O]."""
        return (self.rows_MPO.double() * self.columns_MPI.double().sum(-1, keepdim=True)).sum(1)


LayerSensitivities = Mapping[Role, MatrixSensitivity]
"""The sensitivities of one layer's matrices."""


@dataclass(frozen=True)
class VocabularySensitivities:
    """The sensitivities of the embedding and the head.

    An error dE of the embedding's row v matters where v is the token: 1/2 E[1[token = v] (G . dE_v)^2], G the gradient
    at the row that is looked up. An error of the head's row v matters everywhere: 1/2 E[(1[y = v] - p_v)^2
    (h . dE_v / s)^2], h the head's input, s the number that the model divides logits by, and y a token drawn from p, so
    that the first factor's mean is p_v (1 - p_v).
    """

    lookup_rows_V: torch.Tensor  # E[1[token = v] |G|^2]
    lookup_columns_D: torch.Tensor  # E[G_d^2] / E[|G|^2]
    head_rows_V: torch.Tensor  # E[p_v (1 - p_v)] / s^2
    head_columns_D: torch.Tensor  # E[h_d^2]
    embedding_gradient_moments: torch.Tensor  # float32 [D, D]: E[G G^T]
    head_input_moments: torch.Tensor  # float32 [D, D]: E[h h^T]
    kappa: torch.Tensor  # scalar: E sum_v (1[y = v] - p_v)^2 / s^2, the weight of the head's moments in a tied matrix

    def of(self, role: Role, *, tied: bool) -> MatrixSensitivity:
        """The sensitivity of the embedding, of the head, or of the one matrix that is both."""
        lookup = (self.lookup_rows_V, self.lookup_columns_D, True)
        head = (self.head_rows_V, self.head_columns_D, False)
        parts = [lookup, head] if tied else [lookup if role is Role.TOKEN_EMBEDDING else head]
        rows, columns, routed = zip(*parts, strict=True)
        return MatrixSensitivity(torch.stack(rows)[None], torch.stack(columns)[None], routed)


@dataclass(frozen=True)
class Sensitivities:
    """A folder with a file for each layer, and one for embedding and head; each is read when it is asked for.

    Args:
        folder: the folder.
        tied: True if the head is the embedding.
    """

    folder: Path
    tied: bool

    def of(self, role: Role, layer: int | None = None) -> MatrixSensitivity:
        """A tensor's sensitivity.

        Raises:
            InputError: the file is missing or damaged.
        """
        if layer is None:
            return self.vocabulary.of(role, tied=self.tied)
        return _layer(self.folder, layer)[role]

    @property
    def vocabulary(self) -> VocabularySensitivities:
        """The sensitivities of embedding and head.

        Raises:
            InputError: the file is missing or damaged.
        """
        return VocabularySensitivities(**_load(self.folder / _VOCABULARY))

    def save_layer(self, layer: int, sensitivities: LayerSensitivities) -> None:
        """Writes one layer's file into the folder, which is created if it is missing."""
        tensors: dict[str, torch.Tensor] = {}
        for role, found in sensitivities.items():
            tensors[f"{role.name}.rows"] = found.rows_MPO.contiguous()
            tensors[f"{role.name}.columns"] = found.columns_MPI.clone()  # some roles share them
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _layer_path(self.folder, layer))
        _layer.cache_clear()

    def save_vocabulary(self, sensitivities: VocabularySensitivities) -> None:
        """Writes the file of embedding and head into the folder, which is created if it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {field.name: getattr(sensitivities, field.name) for field in fields(VocabularySensitivities)}
        save_file(tensors, self.folder / _VOCABULARY)


_VOCABULARY = "vocabulary.safetensors"


def _layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"


@lru_cache(maxsize=1)  # a layer's tensors are asked for one after the other
def _layer(folder: Path, layer: int) -> dict[Role, MatrixSensitivity]:
    tensors = _load(_layer_path(folder, layer))
    names = dict.fromkeys(name.split(".")[0] for name in tensors)
    return {Role[name]: MatrixSensitivity(tensors[f"{name}.rows"], tensors[f"{name}.columns"]) for name in names}


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the sensitivities in {path} cannot be read ({error}); remove the folder to gather them again"
        ) from None

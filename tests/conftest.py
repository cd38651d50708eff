"""Fixtures of all tests: the trained models, the held-out text, and small checkpoints cut out of the models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from compressors.model import quiet_libraries as quiet_libraries  # before a test imports a runtime

_REPOSITORY = Path(__file__).parent.parent
_FOLDERS = {
    "fine": _REPOSITORY / "exporter" / "demo" / "model",
    "coarse": _REPOSITORY / "tests" / "fixtures" / "coarse",
    "olmoe": _REPOSITORY / "tests" / "fixtures" / "olmoe",
}


_LONGEST = ("test_kills", "test_team", "test_run", "test_faults")
"""Files that take minutes: they begin first, so that one process does not work on them when the other has finished."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest files to the front."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(scope="session")
def fine_folder() -> Path:
    """Qwen3-MoE: 6 layers, 32 experts, top-4; one weight file."""
    return _FOLDERS["fine"]


@pytest.fixture(scope="session")
def coarse_folder() -> Path:
    """Mixtral: 6 layers, 8 experts, top-2; three weight files with an index."""
    return _FOLDERS["coarse"]


@pytest.fixture(scope="session")
def olmoe_folder() -> Path:
    """OLMoE: 3 layers, 16 experts, top-4, gates not normalised, query and key norms over all heads; untied head."""
    return _FOLDERS["olmoe"]


@pytest.fixture(scope="session")
def latent_folder() -> Path:
    """GLM-4.7-Flash: 4 layers, the first dense, latent attention, 32 experts, top-4, a shared one, trained biases."""
    return _REPOSITORY / "tests" / "fixtures" / "latent"


@pytest.fixture(scope="session", params=sorted(_FOLDERS))
def family_folder(request: pytest.FixtureRequest) -> Path:
    """Each trained model in turn."""
    return _FOLDERS[request.param]


@pytest.fixture(scope="session")
def calibration_folder() -> Path:
    """The bundled calibration text, one file per domain."""
    return _REPOSITORY / "exporter" / "demo" / "text" / "calibration"


@pytest.fixture(scope="session")
def heldout_folder() -> Path:
    """The bundled held-out text, one file per domain."""
    return _REPOSITORY / "exporter" / "demo" / "text" / "heldout"


@pytest.fixture(scope="session")
def heldout_text(heldout_folder: Path) -> str:
    """All five domains, in order of their names."""
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(heldout_folder.glob("*.txt")))


@pytest.fixture(scope="session")
def heldout_tokens(heldout_text: str, fine_folder: Path) -> npt.NDArray[np.int64]:
    """int64 [tokens]: the held-out text in the vocabulary that the trained models share."""
    tokenizer = Tokenizer.from_file(str(fine_folder / "tokenizer.json"))
    return np.array(tokenizer.encode(heldout_text).ids, dtype=np.int64)


@pytest.fixture(scope="session")
def toy_checkpoint() -> Callable[..., Path]:
    """Cuts the first layers out of a trained model: ``toy_checkpoint(tmp_path, n_layers=2, model="fine")``.

    Returns the new checkpoint's folder, inside ``tmp_path``, with tokenizer; embedding, final norm and head stay.
    """
    return _cut_layers


def _cut_layers(tmp_path: Path, n_layers: int = 2, model: str = "fine") -> Path:
    source = _FOLDERS[model]
    folder = tmp_path / f"{model}-{n_layers}-layers"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = n_layers
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                layer = re.match(r"model\.layers\.(\d+)\.", name)
                if layer is None or int(layer[1]) < n_layers:
                    tensors[name] = reader.get_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def to_fp8() -> Callable[..., Path]:
    """Makes a checkpoint's projections float8: ``to_fp8(folder, new, dequantized, block=(128, 128))``; returns ``new``.

    Every block of 128 x 128 values of a projection gets a scale, as the FP8 repositories on the hub have them. Into
    ``dequantized``, where given, goes the same model in bfloat16: each value times the scale of its block.
    """
    return _to_fp8


def _to_fp8(
    folder: Path,
    new: Path,
    dequantized: Path | None = None,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
) -> Path:
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            stored[name], scales = _blocks_in_fp8(tensor.float(), block, scale_dtype)
            stored[f"{name}_scale_inv"] = scales
            by_row = scales.float().repeat_interleave(block[0], dim=-2)[..., : tensor.shape[-2], :]
            by_value = by_row.repeat_interleave(block[1], dim=-1)[..., : tensor.shape[-1]]
            plain[name] = (stored[name].float() * by_value).bfloat16()
        else:
            stored[name] = plain[name] = tensor
    for target, tensors in ((new, stored), (dequantized, plain)):
        if target is not None:
            shutil.copytree(folder, target)
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    (new / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return new


def _blocks_in_fp8(
    tensor: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 values of a tensor [..., rows, columns], and the scale of each block."""
    n_rows, n_columns = (-(-size // width) for size, width in zip(tensor.shape[-2:], block, strict=True))
    scales = torch.empty(*tensor.shape[:-2], n_rows, n_columns, dtype=scale_dtype)
    values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
    for row in range(n_rows):
        for column in range(n_columns):
            rows = slice(row * block[0], (row + 1) * block[0])
            columns = slice(column * block[1], (column + 1) * block[1])
            part = tensor[..., rows, columns]
            scale = (part.abs().amax(dim=(-2, -1)) / 448).to(scale_dtype)
            scales[..., row, column] = scale
            values[..., rows, columns] = (part / scale.float()[..., None, None]).to(torch.float8_e4m3fn)
    return values, scales

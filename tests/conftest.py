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
from safetensors import safe_open
from safetensors.torch import save_file
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

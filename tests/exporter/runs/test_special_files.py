"""Files that are not regular are refused at once and by name: a pipe would block, a device never ends."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.calibration.splits import read_splits, tokenize_heldout
from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.weight_file import WeightFile
from exporter.hub import resolve_model
from exporter.planning.job import Flags
from validate.metrics.logits_file import LogitsFile


@pytest.fixture(params=["a named pipe", "a device", "a socket", "a folder"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A path of each kind, and what it is called."""
    path = tmp_path / "x"
    if request.param == "a named pipe":
        os.mkfifo(path)
    elif request.param == "a device":
        path = Path("/dev/zero")
    elif request.param == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.mkdir()
    return path, request.param


_READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": WeightFile,
    "GGUF": GgufFile,
    "reference logits": LogitsFile,
}


@pytest.mark.parametrize("reader", _READERS)
def test_readers_refuse_it(reader: str, special: tuple[Path, str]) -> None:
    path, kind = special
    with pytest.raises(InputError, match=rf"{path} is {kind}; give a regular file"):
        _READERS[reader](path)


def test_texts_refuse_it_alone_and_in_a_folder(special: tuple[Path, str], fine_folder: Path, tmp_path: Path) -> None:
    path, kind = special
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").symlink_to(path)
    for place in (texts, *([] if path.is_dir() else [path])):
        for read in (read_splits, lambda text: tokenize_heldout(text, fine_folder)):
            with pytest.raises(InputError, match=rf" is {kind}; give a regular file|{path} is {kind}"):
                read(place)


def test_a_checkpoint_refuses_it_and_a_recipe_too(special: tuple[Path, str], toy_model: Path, tmp_path: Path) -> None:
    path, kind = special
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").symlink_to(path)
    if path.is_dir():
        assert resolve_model(str(model)) == model, "a folder inside a checkpoint is no harm"
    else:
        with pytest.raises(InputError, match=rf"^MODEL: .*tokenizer_config\.json is {kind}"):
            resolve_model(str(model))
    with pytest.raises(InputError, match=r"^--recipe: .* is not a file"):
        Flags(recipe=path).job()

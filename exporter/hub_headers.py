"""A hub model's headers without its weights: a folder that reads like the checkpoint, from a few megabytes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.sources.hugging_face.weight_folder import INDEX
from exporter.hub import (
    download_beside_weights,
    is_hub_file,
    is_hub_id,
    network_error,
    resolve_model,
    stays_offline,
)

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

__all__ = ["folder_with_headers", "headers_of_hub_model", "holds_headers_alone"]

_WEIGHTS = re.compile(r"(?!consolidated).*\.safetensors", re.ASCII)
_FIRST_BYTES = 256 << 10  # a file of 5 GB with single experts has a header of about 200 KB
_MOST_BYTES = 100_000_000  # the format's own limit of a header
_AT_ONCE = 8  # requests
_PREFIX = "moe-export-headers-"


@contextmanager
def folder_with_headers(model: str, revision: str | None, *, offline: bool) -> Iterator[Path]:
    """The place of a model of which headers will be read.

    A local model is where it is. Of a hub model, the small files are downloaded, and of each weight file the header;
    the rest of it is a hole that takes no disk. The folder goes when the context ends.

    Args:
        model: a folder, a GGUF file, or a hub id.
        revision: of a hub model; None: its newest.
        offline: True takes hub models from the cache, with their weights.

    Raises:
        InputError: there is no such model, or the hub cannot be reached or used.
    """
    if is_hub_file(model) and not stays_offline(offline):
        raise InputError(
            f"MODEL: {model} would be downloaded whole; name the repository of its original, of which the headers are "
            "enough, or download the file first"
        )
    if not is_hub_id(model) or stays_offline(offline):
        yield resolve_model(model, revision, offline=offline)
        return
    downloaded = download_beside_weights(model, revision)
    if _has_weights(downloaded):
        yield downloaded  # an earlier run downloaded it
        return
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as temporary:
        # the path is that of the cache, by which a written file knows its original
        folder = Path(temporary, *downloaded.parts[-3:])
        folder.mkdir(parents=True)
        for file in downloaded.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                (folder / file.name).symlink_to(file.resolve())
        _write_headers(model, downloaded.name, folder)
        yield folder


def holds_headers_alone(folder: Path) -> bool:
    """True if the weights of such a folder are still to be downloaded."""
    return any(parent.name.startswith(_PREFIX) for parent in folder.parents)


def _has_weights(folder: Path) -> bool:
    """True if an earlier run downloaded all weight files, not some of them."""
    index = folder / INDEX
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    files = read_json(index).get("weight_map")
    return isinstance(files, dict) and all((folder / str(file)).is_file() for file in files.values())


@contextmanager
def headers_of_hub_model(model: str | None, revision: str | None, *, offline: bool) -> Iterator[Path | None]:
    """As :func:`folder_with_headers` for the repository of a checkpoint; None for any other model.

    Raises:
        InputError: as :func:`folder_with_headers`.
    """
    if model is None or not is_hub_id(model):
        yield None
        return
    with folder_with_headers(model, revision, offline=offline) as folder:
        yield folder


def _write_headers(model: str, commit: str, folder: Path) -> None:
    """Writes each weight file of a repository's top folder with its header and its length.

    Raises:
        InputError: the hub cannot be used, or a file is no safetensors file.
    """
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfFileSystem  # a quarter of a second, which local models do not need
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfFileSystem()

    def write(entry: dict[str, Any]) -> None:
        header = _header(hub, entry["name"])
        with (folder / Path(entry["name"]).name).open("wb") as file:
            file.write(header)
            file.truncate(max(entry["size"], len(header)))

    try:
        entries: list[Any] = hub.ls(f"{model}@{commit}", detail=True)
        weights = [entry for entry in entries if _WEIGHTS.fullmatch(Path(entry["name"]).name)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(write, weights))
    except (HfHubHTTPError, network_error(), OSError) as error:
        raise InputError(f"MODEL: headers of {model} could not be read ({error}); try again") from None


def _header(hub: HfFileSystem, path: str) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, little-endian, and so many bytes of JSON.

    Raises:
        OSError: the file is none.
    """
    with hub.open(path, "rb", cache_type="none") as file:
        first: bytes = file.read(_FIRST_BYTES)
        n_bytes = 8 + int.from_bytes(first[:8], "little")
        if n_bytes > _MOST_BYTES:
            raise OSError(f"{path} does not begin like a safetensors file")
        rest: bytes = file.read(max(0, n_bytes - len(first)))
    return (first + rest)[:n_bytes]

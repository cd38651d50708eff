"""Finds the inputs: a local folder, the Hugging Face hub, or the model and text bundled with this package."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_split import split_parts
from compressors.model.files.regular_file import refuse_special
from compressors.model.files.vocabularies.made_files import MADE_OF
from compressors.model.sources.hugging_face.unknown_family import refuse_unknown_family
from compressors.model.sources.hugging_face.weight_folder import INDEX
from exporter.estimating.sizes import format_size

__all__ = [
    "bundled_text",
    "download_beside_weights",
    "download_bytes",
    "is_hub_file",
    "is_hub_id",
    "network_error",
    "resolve_model",
    "resolve_original",
    "stays_offline",
]

_HUB_FILE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)/(?P<file>[\w./-]+\.gguf)", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_WEIGHTS = "*.safetensors"
_WANTED_FILES = [
    "*.json",
    _WEIGHTS,
    "tokenizer.model",
    "merges.txt",
    *MADE_OF,
    "*.jinja",
    "README.md",
    *("LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "USE_POLICY*", "COPYING*"),
]
_FIRST_FILES = ["config.json", INDEX]  # they show whether the family is known, before the weights are downloaded
# Other formats in subfolders, and a second copy of the weights in the trainer's own naming.
_UNWANTED_FILES = ["*/*", "consolidated*"]


def resolve_model(model: str | None, revision: str | None = None, *, offline: bool = False) -> Path:
    """The place of a model: as given, downloaded from the hub (or found in its cache), or bundled for None.

    Pickled weights are never downloaded. ``offline`` takes hub models from the cache only. ``OWNER/NAME/FILE.gguf`` is
    one GGUF file of a repository, with the other parts of its model.

    Raises:
        InputError: there is no such folder, model or revision, the licence was not accepted, or the hub is out of
            reach.
    """
    if model is None:
        return _bundled("model")
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        _refuse_special_files(folder)
        return folder
    if model and folder.exists():
        if folder.suffix == ".gguf":
            return folder
        raise InputError(
            f"MODEL: {model} is a file; give the folder that holds config.json and the weights, or a .gguf"
        )
    if (file := _HUB_FILE.fullmatch(model)) is not None:
        parts = [part.as_posix() for part in split_parts(Path(file["file"]))]
        return _existing(_download(file["id"], revision, offline, parts) / file["file"], model)
    if _HUB_ID.fullmatch(model) is None:
        raise InputError(f"MODEL: there is no folder {model!r}, and it is not a hub id (OWNER/NAME) either")
    refuse_unknown_family(_download(model, revision, offline, _FIRST_FILES, _UNWANTED_FILES))
    if not stays_offline(offline):
        _refuse_too_little_room(model, revision)
    return _download(model, revision, offline, _WANTED_FILES, _UNWANTED_FILES)


def stays_offline(offline: bool) -> bool:
    """True if hub models are taken from the cache only: by ``--offline``, or by the variable ``HF_HUB_OFFLINE``."""
    if offline:
        return True
    from huggingface_hub import constants  # it reads the environment once, when it is imported

    return bool(constants.HF_HUB_OFFLINE)


def network_error() -> type[Exception]:
    """The base of all errors of the library with which the installed huggingface_hub connects, such as httpx."""
    from huggingface_hub import utils

    client: Any = utils.get_session()  # type: ignore[attr-defined]  # documented, but not exported by name
    error: type[Exception] = sys.modules[type(client).__module__.partition(".")[0]].HTTPError
    return error


def is_hub_id(model: str) -> bool:
    """True if the model can only be a repository of the hub, and nothing local."""
    return not Path(model).expanduser().exists() and _HUB_ID.fullmatch(model) is not None


def is_hub_file(model: str) -> bool:
    """True if the model can only be a GGUF file of the hub."""
    return not Path(model).expanduser().exists() and _HUB_FILE.fullmatch(model) is not None


def download_beside_weights(model: str, revision: str | None) -> Path:
    """The folder in the hub's cache, named after the commit, with all that a checkpoint has beside its weights.

    Raises:
        InputError: as :func:`resolve_model`.
    """
    beside = [pattern for pattern in _WANTED_FILES if pattern != _WEIGHTS]
    refuse_unknown_family(_download(model, revision, False, _FIRST_FILES, _UNWANTED_FILES))
    return _download(model, revision, False, beside, _UNWANTED_FILES)


def resolve_original(against: str | None, job: Mapping[str, Any]) -> Path:
    """The checkpoint that published files are compared with.

    Args:
        against: the value of ``--against``; None: the checkpoint that the files were made from.
        job: the job in the files' report.

    Raises:
        InputError: as :func:`resolve_model`; the message says so if a local folder is gone.
    """
    recorded = job["model"]
    is_local = isinstance(recorded, str) and (Path(recorded).is_absolute() or recorded.startswith("./"))
    if against is None and is_local and not Path(recorded).exists():
        raise InputError(f"{recorded}, which these files were made from, is not here; name it with --against")
    return resolve_model(against or recorded, job["revision"])


def _refuse_special_files(folder: Path) -> None:
    """Refuses a checkpoint that holds a pipe, a device or a socket: opening one might wait for ever."""
    try:
        files = [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    except OSError as error:
        raise InputError(f"MODEL: {folder} cannot be read ({error.strerror})") from None
    for path in files:
        refuse_special(path, "MODEL: ")


def bundled_text(split: str) -> Path:
    """The folder of the bundled text, one file per domain; ``split`` is ``calibration`` or ``heldout``."""
    return _bundled("text", split)


def _bundled(*parts: str) -> Path:
    folder = Path(str(importlib.resources.files("exporter").joinpath("demo", *parts)))
    if not folder.is_dir():
        raise InputError(f"the bundled files are missing in {folder}; install moe-export again")
    return folder


def _existing(file: Path, model: str) -> Path:
    if not file.is_file():
        raise InputError(
            f"MODEL: there is no file {model} on the hub; check its name, and give the first part of several"
        )
    return file


def _refuse_too_little_room(model: str, revision: str | None) -> None:
    """Refuses a download that the disk of the hub's cache cannot hold; what is there already is not counted.

    Raises:
        InputError: the disk is too small; the message says how much is needed where.
    """
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    needed = download_bytes(model, revision)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"MODEL: {model} has {format_size(needed)} to download, and {place} has {format_size(free)} free; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def download_bytes(model: str, revision: str | None) -> int:
    """Bytes of a hub model's files that are not in the cache yet.

    Raises:
        InputError: as :func:`resolve_model`.
    """
    files = _snapshot(model, revision, False, _WANTED_FILES, _UNWANTED_FILES, dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def _download(
    model: str, revision: str | None, offline: bool, files: Sequence[str], ignored: Sequence[str] | None = None
) -> Path:
    return Path(_snapshot(model, revision, offline, files, ignored))


def _snapshot(
    model: str,
    revision: str | None,
    offline: bool,
    files: Sequence[str],
    ignored: Sequence[str] | None,
    *,
    dry_run: bool = False,
) -> Any:
    """The folder of some files of a repository, or, with ``dry_run``, what would be downloaded.

    An interrupted download goes on where it was, also in another run.
    """
    from huggingface_hub import snapshot_download  # only such models need the library, which takes long to import
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return snapshot_download(
            model,
            revision=revision,
            local_files_only=offline,
            allow_patterns=list(files),
            ignore_patterns=None if ignored is None else list(ignored),
            dry_run=dry_run,
        )
    except GatedRepoError:
        raise InputError(
            f"MODEL: {model} is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"MODEL: {model} is neither a local folder nor a model on the hub that you may read; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"--revision: {model} has no revision {revision!r} on the hub") from None
    except LocalEntryNotFoundError:
        what = f"{model} (revision {revision})" if revision else model
        if stays_offline(offline):
            how = "without --offline" if offline else "with HF_HUB_OFFLINE unset"
            raise InputError(f"MODEL: {what} is not in the hub's cache; run once {how}") from None
        raise InputError(f"MODEL: {what} is no local folder, and the hub cannot be reached to download it") from None
    except (HfHubHTTPError, network_error(), OSError) as error:
        raise InputError(f"MODEL: {model} could not be downloaded ({error}); the same command goes on") from None

"""Uploads a finished output folder to the Hugging Face hub: ``--push ORG/NAME``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.names import shown
from exporter.file_names import REPORT, SUMS
from exporter.hub import network_error
from exporter.publishing.json_text import json_text
from exporter.publishing.without_folders import without_folders

__all__ = ["checked_repository", "push_folder", "refuse_unless_logged_in"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def checked_repository(name: str, *, offline: bool) -> str:
    """Returns the name of a repository to push to.

    Raises:
        InputError: it is not of the form ORG/NAME, or the hub must not be used.
    """
    if _REPOSITORY.fullmatch(name) is None:
        raise InputError(f"--push: '{shown(name)}' is not the name of a repository; give ORG/NAME")
    if offline:
        raise InputError("--push uploads to the hub; leave --offline out, or --push")
    return name


def refuse_unless_logged_in(repository: str) -> None:
    """Asks the hub who we are, hours before anything is uploaded.

    Raises:
        InputError: there is no token, the hub refuses it, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("--push uploads to the hub, and HF_HUB_OFFLINE is set; unset it, or leave --push out")
    token = get_token()
    if token is None:
        raise InputError(f"--push: there is no token for {repository}; {_LOG_IN}")
    with _hub_errors(repository, token):
        HfApi(token=token).whoami()


def push_folder(folder: Path, repository: str) -> str:
    """Uploads all files of a published folder; files of the repository with other names stay.

    A repository that does not exist is made, and is private. An interrupted upload goes on when it is repeated. Reports
    are uploaded without the folders of this machine.

    Returns:
        The address of the repository.

    Raises:
        InputError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    hub = HfApi(token=token)
    with _hub_errors(repository, token):
        address = str(hub.create_repo(repository, private=True, exist_ok=True))
        message, sums = f"Upload {folder.name} with moe-export", [SUMS, f"*/{SUMS}"]
        others = [*sums, REPORT, f"*/{REPORT}"]
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=others)
        with _shared_reports(folder) as reports:
            hub.upload_folder(repo_id=repository, folder_path=reports, commit_message=message)
        # last, so that they are there once all files are
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, allow_patterns=sums)
    return address


@contextmanager
def _shared_reports(folder: Path) -> Iterator[Path]:
    """A temporary folder with the reports of a published one, which tell nothing of this machine's folders."""
    with TemporaryDirectory() as temporary:
        for path in (path for path in folder.rglob(REPORT) if path.is_file()):
            shared = without_folders(read_json(path), path.parent)
            copy = Path(temporary) / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(json_text(shared), encoding="utf-8")
        yield Path(temporary)


@contextmanager
def _hub_errors(repository: str, token: str | None) -> Iterator[None]:
    """Turns the hub's refusals into messages; the token is in none of them."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            raise InputError(f"--push: the hub does not accept the token; {_LOG_IN}") from None
        if status == 403:
            raise InputError(f"--push: the token may not write to {repository}; {_LOG_IN}") from None
        raise InputError(f"--push: {repository} could not be uploaded ({_said(error, token)}); try again") from None
    except (network_error(), OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--push: {repository} could not be uploaded ({_said(error, token)}); try again") from None


def _said(error: Exception, token: str | None) -> str:
    text = str(error).strip() or type(error).__name__
    return shown(text.replace(token, "***") if token else text)

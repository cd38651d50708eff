"""What is published names files, and tells nothing of the folders of who made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from exporter.hub import resolve_original
from exporter.publishing.without_folders import without_folders

_HOME = "/home/somebody"
_JOB: dict[str, Any] = {
    "model": f"{_HOME}/models/Big-MoE",
    "revision": None,
    "calibration": [f"{_HOME}/notes/mine.txt:2", "/mnt/disk/theirs.txt:1"],
    "text": f"{_HOME}/notes/other.txt",
    "context": 4096,
}
_COMMAND = (
    f"moe-export {_HOME}/models/Big-MoE --calibration {_HOME}/notes/mine.txt:2 --calibration=/mnt/disk/theirs.txt:1 "
    "--imatrix '/srv/im portance.gguf' --recipe ../../secret/my.yaml --work-dir '~/work' --text texts/other.txt"
)


def _report(**further: Any) -> dict[str, Any]:
    row = {"error": f"error loading model /media/big/out.work/file.gguf, not {_HOME}/models/Big-MoE", "perplexity": 7.5}
    return {"job": _JOB, "command": _COMMAND, "validation": [row], "recipe": {"sizes": [1, 2]}, **further}


def test_paths_are_names() -> None:
    report = _report()
    shared = without_folders(report, Path("/media/big/out"))
    text = json.dumps(shared)
    assert [folder for folder in ("somebody", "/mnt", "/srv", "secret", "/media", "~") if folder in text] == []
    assert shared["job"] == {
        "model": "./Big-MoE",
        "revision": None,
        "calibration": ["mine.txt:2", "theirs.txt:1"],
        "text": "other.txt",
        "context": 4096,
    }
    assert shared["command"] == (
        "moe-export Big-MoE --calibration mine.txt:2 --calibration=theirs.txt:1 "
        "--imatrix 'im portance.gguf' --recipe my.yaml --work-dir work --text texts/other.txt"
    )
    assert shared["validation"] == [{"error": "error loading model out.work/file.gguf, not Big-MoE", "perplexity": 7.5}]
    assert report == _report(), "the report itself is as it was"


def test_every_part_of_a_run_with_several_outputs_is_told_alike() -> None:
    whole = {"parts": {"8GB": _report(), "12GB": _report()}, "job": _JOB}
    shared = without_folders(whole, Path("/media/big/out"))
    assert list(shared["parts"]) == ["8GB", "12GB"]
    assert "somebody" not in json.dumps(shared)
    assert shared["parts"]["8GB"]["job"] == shared["job"]


@pytest.mark.parametrize(
    ("model", "shared"),
    [
        (None, None),
        ("owner/name", "owner/name"),
        ("/cache/models--owner--name/snapshots/0123", "owner/name"),
        ("/models/x-Q8_0.gguf", "./x-Q8_0.gguf"),
    ],
)
def test_a_model_of_the_hub_keeps_its_id(model: str | None, shared: str | None) -> None:
    assert without_folders(_report(job=_JOB | {"model": model}), Path("out"))["job"]["model"] == shared


def test_a_published_local_model_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = without_folders(_report(), Path("out"))["job"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^\./Big-MoE, which these files were made from, is not here; .* --against"):
        resolve_original(None, job)
    (tmp_path / "Big-MoE").mkdir()
    assert resolve_original(None, job).resolve() == tmp_path / "Big-MoE"

"""Models of the hub are planned from their headers, downloaded where a download stopped, and pushed back."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from exporter.hub_push import checked_repository
from exporter.progress.events import Event, Message
from exporter.run import Result, push_release
from tests.hub_stand_in import REPOSITORY, TOKEN, HubStandIn, hub_stand_in

_ROOT = Path(__file__).parents[3]
_PLAN = ("--budget", "3MB", "--budget-kind", "file", "--quant", "Q4_0", "--threads", "1", "--dry-run", "--json")


def _run(hub: HubStandIn, cache: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(cache, **variables)
    return subprocess.run([sys.executable, *command], env=environment, cwd=_ROOT, capture_output=True, text=True)


def _plan(hub: HubStandIn, model: str, folder: Path, texts: tuple[Path, Path], *further: str) -> Any:
    arguments = (
        "--calibration",
        str(texts[0]),
        "--text",
        str(texts[1]),
        "--out",
        str(folder / "out"),
        *_PLAN,
        *further,
    )
    return _run(hub, folder / "cache", "-m", "exporter", model, *arguments)


def test_a_hub_model_is_planned_before_its_weights_are_downloaded(
    toy_model: Path, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    with hub_stand_in(toy_model) as hub:
        planned = _plan(hub, REPOSITORY, tmp_path, small_texts)
        assert 0 < hub.sent["model.safetensors"] < (toy_model / "model.safetensors").stat().st_size
        here = _plan(hub, str(toy_model), tmp_path, small_texts)
    assert (planned.returncode, here.returncode) == (0, 0), planned.stderr
    recipe, same = json.loads(planned.stdout), json.loads(here.stdout)
    assert recipe["source"].pop("model") == REPOSITORY
    del same["source"]["model"]
    assert recipe == same


def test_a_download_that_breaks_off_goes_on_where_it_was(toy_model: Path, tmp_path: Path) -> None:
    size = (toy_model / "model.safetensors").stat().st_size
    resolve = (
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 20\n"  # it keeps whole chunks
        "from exporter.hub import resolve_model; print(resolve_model('owner/model', 'v2'))"
    )
    with hub_stand_in(toy_model) as hub:
        hub.revisions.add("v2")
        hub.cut["model.safetensors"] = 5 << 20
        done = _run(hub, tmp_path, "-c", resolve)
        assert done.returncode == 0, done.stderr
        assert hub.sent["model.safetensors"] == size, "no byte was sent twice"
        again = _run(hub, tmp_path, "-c", resolve)
        assert hub.sent["model.safetensors"] == size, "the cache has it"
        offline = _run(hub, tmp_path, "-c", resolve, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    folder = Path(done.stdout.strip())
    assert done.stdout == again.stdout == offline.stdout
    assert (folder / "model.safetensors").read_bytes() == (toy_model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("variables", "call", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "'owner/model'", "not in the hub's cache; run once with HF_HUB_OFFLINE unset"),
        ({}, "'owner/model', 'v9'", "--revision: owner/model has no revision 'v9'"),
        ({}, "'owner/modle'", "owner/modle is neither a local folder nor a model on the hub"),
    ],
)
def test_what_cannot_be_downloaded_is_said(
    variables: dict[str, str], call: str, message: str, toy_model: Path, tmp_path: Path
) -> None:
    script = (
        "from exporter.hub import *; from compressors.model.errors import InputError\n"
        f"try: resolve_model({call})\nexcept InputError as error: print(error)"
    )
    with hub_stand_in(toy_model) as hub:
        done = _run(hub, tmp_path, "-c", script, **variables)
    assert message in done.stdout, done.stderr


def test_a_disk_that_is_too_small_is_said_before_the_download(toy_model: Path, tmp_path: Path) -> None:
    script = (
        "import shutil; from exporter import hub; from compressors.model.errors import InputError\n"
        "hub.shutil.disk_usage = lambda place: shutil._ntuple_diskusage(10, 9, 1000)\n"
        "try: hub.resolve_model('owner/model')\nexcept InputError as error: print(error)"
    )
    with hub_stand_in(toy_model) as hub:
        done = _run(hub, tmp_path / "new" / "cache", "-c", script)
        assert hub.sent["model.safetensors"] == 0
    assert "to download" in done.stdout and "set HF_HOME to a folder on another disk" in done.stdout, done.stderr


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder as a run publishes it."""
    folder = tmp_path / "release"
    (folder / "onnx").mkdir(parents=True)
    for name, content in {"README.md": b"# card", "model.gguf": b"GGUF" * 5000, "onnx/model.onnx": b"graph"}.items():
        (folder / name).write_bytes(content)
    digest = hashlib.sha256((folder / "model.gguf").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.gguf\n")
    job = {"model": f"{tmp_path}/MyMoE", "text": None}
    report = {"job": job, "command": f"moe-export {tmp_path}/MyMoE --budget 1GB", "validation": []}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def _push(hub: HubStandIn, folder: Path, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; from pathlib import Path; from exporter.hub_push import *\n"
        "from compressors.model.errors import InputError\n"
        "try:\n"
        "    refuse_unless_logged_in('team/small')\n"
        "    print(push_folder(Path(sys.argv[1]), 'team/small'))\n"
        "except InputError as error: print(error)"
    )
    return _run(hub, cache, "-c", script, str(folder), **variables)


def test_a_release_is_pushed_whole_to_a_private_repository(toy_model: Path, release: Path, tmp_path: Path) -> None:
    with hub_stand_in(toy_model) as hub:
        done = _push(hub, release, tmp_path / "cache", HF_TOKEN=TOKEN)
        assert done.stdout.strip() == f"{hub.endpoint}/team/small", done.stderr
        again = _push(hub, release, tmp_path / "cache", HF_TOKEN=TOKEN)
        assert again.stdout == done.stdout, "a repository that exists is no error"
    uploaded = hub.uploaded["team/small"]
    report = json.loads(uploaded.pop("report.json"))
    assert report == {
        "job": {"model": "./MyMoE", "text": None},
        "command": "moe-export MyMoE --budget 1GB",
        "validation": [],
    }
    assert uploaded == {
        path.relative_to(release).as_posix(): path.read_bytes()
        for path in release.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    assert hub.private == {"team/small": True}
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "--push: there is no token for team/small; log in with `hf auth login`"),
        ({"HF_TOKEN": "hf_another"}, "--push: the hub does not accept the token"),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "--push: team/small could not be uploaded"),
    ],
)
def test_a_push_that_cannot_work_is_refused_first(
    variables: dict[str, str], message: str, toy_model: Path, release: Path, tmp_path: Path
) -> None:
    with hub_stand_in(toy_model) as hub:
        done = _push(hub, release, tmp_path / "cache", **variables)
    assert message in done.stdout, done.stderr
    assert not hub.uploaded
    assert all(value not in done.stdout + done.stderr for name, value in variables.items() if name == "HF_TOKEN")


@pytest.mark.parametrize("passed", [True, False])
def test_only_what_passed_is_pushed(passed: bool, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Path] = []
    said: list[Event] = []
    monkeypatch.setattr("exporter.run.push_folder", lambda folder, repository: pushed.append(folder) or "its address")
    push_release(Result({"verdict": {"passed": passed}}, release), "team/small", said.append)
    assert pushed == ([release] if passed else [])
    assert said[-1] == Message("pushed: its address" if passed else "not pushed to team/small: a check failed")


@pytest.mark.parametrize("name", ["small", "team/", "a/b/c", "team/na me", "--force"])
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--push: .* give ORG/NAME"):
        checked_repository(name, offline=False)


def test_pushing_and_staying_offline_exclude_each_other() -> None:
    with pytest.raises(InputError, match="leave --offline out"):
        checked_repository("team/small", offline=True)
    assert checked_repository("team/small", offline=False) == "team/small"

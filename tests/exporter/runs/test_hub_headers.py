"""``fits`` and ``inspect`` of a hub model: what they say is what they say of its folder, from headers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.cli import main
from exporter.writing.gguf.writer import write_gguf
from tests.gguf_copies import split_gguf
from tests.hub_stand_in import COMMIT, REPOSITORY, HubStandIn, hub_stand_in

_ROOT = Path(__file__).parents[3]


def _run(hub: HubStandIn, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool in a new process: huggingface_hub reads its settings when it is imported."""
    hidden = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HUGGINGFACE")
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": hub.endpoint}
    command = [sys.executable, "-m", "exporter", *arguments]
    return subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)


def _json(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _in_two_files(folder: Path) -> None:
    """Puts half of the tensors into a second file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_headers_say_the_same_as_the_folder(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--model" / "snapshots" / COMMIT  # where its name is the same
    folder.mkdir(parents=True)
    for file in toy_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    _in_two_files(folder)
    with hub_stand_in(folder) as hub:
        there = _json(_run(hub, tmp_path / "cache", "inspect", REPOSITORY, "--json"))
        rows = _json(_run(hub, tmp_path / "cache", "fits", REPOSITORY, "--budget", "75MB", "--json"))
    here = json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json"]).stdout)
    same_rows = json.loads(CliRunner().invoke(main, ["fits", str(folder), "--budget", "75MB", "--json"]).stdout)
    assert isinstance(there, dict)
    assert there | {"folder": ""} == here | {"folder": ""}
    assert there["folder"] == REPOSITORY
    assert rows == same_rows
    weights = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    assert all(0 < hub.sent[file.name] < file.stat().st_size / 2 for file in weights)


def test_a_file_that_is_no_checkpoint_is_named(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in toy_model.iterdir():
        (folder / file.name).write_bytes(b"\xff" * 1000 if file.suffix == ".safetensors" else file.read_bytes())
    with hub_stand_in(folder) as hub:
        done = _run(hub, tmp_path / "cache", "inspect", REPOSITORY)
    assert done.returncode == 2
    assert "model.safetensors does not begin like a safetensors file" in done.stderr


def test_a_gguf_file_is_not_downloaded_for_its_header(toy_model: Path, tmp_path: Path) -> None:
    with hub_stand_in(toy_model) as hub:
        done = _run(hub, tmp_path / "cache", "fits", f"{REPOSITORY}/model-Q8_0.gguf")
    assert (done.returncode, sum(hub.sent.values())) == (2, 0)
    assert "would be downloaded whole" in done.stderr


def test_all_parts_of_a_gguf_file_are_downloaded_and_nothing_else(toy_model: Path, tmp_path: Path) -> None:
    """They lie in a folder of their type, as on the hub, beside the files of another type."""
    whole = tmp_path / "model-Q8_0.gguf"
    write_gguf(Student.teacher(open_source(toy_model)), "Q8_0", whole, name="model", threads=1)
    (tmp_path / "hub" / "Q8_0").mkdir(parents=True)
    first, second = split_gguf(whole, tmp_path / "hub" / "Q8_0" / "model-Q8_0", 2)
    (tmp_path / "hub" / "model-Q4_0.gguf").write_bytes(b"GGUF")
    flags = ("--budget", "90MB", "--quant", "Q8_0", "--experts", "16", "--formats", "gguf", "--recover", "none")
    flags += ("--dry-run", "--json", "--out", str(tmp_path / "out"))
    with hub_stand_in(tmp_path / "hub") as hub:
        done = _run(hub, tmp_path / "cache", f"{REPOSITORY}/Q8_0/{first.name}", *flags)
        there = _json(done)
        missing = _run(hub, tmp_path / "cache", f"{REPOSITORY}/model-Q5_0.gguf", *flags)
        assert hub.sent == {f"Q8_0/{part.name}": part.stat().st_size for part in (first, second)}
    here = json.loads(CliRunner().invoke(main, [str(first), *flags]).stdout)
    assert there == here
    assert "model card" not in done.stderr
    assert missing.returncode == 2 and "there is no file owner/model/model-Q5_0.gguf on the hub" in missing.stderr

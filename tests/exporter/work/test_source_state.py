"""Decides what counts as a change of the checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.work.input_state import SourceState


@pytest.fixture
def model(tmp_path: Path, toy_model: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def _touch(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def _touch_config(model: Path) -> None:
    os.utime(model / "config.json", ns=(1, 1))


def _cut_off(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)


def _rename_a_tensor(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data.replace(b"layers.1.", b"layers.2.", 1))


def _edit_config(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("2", "3", 1))


def _remove(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def _add_weights(model: Path) -> None:
    (model / "more.safetensors").write_bytes(b"")


def _add_a_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")


def _add_generation_settings(model: Path) -> None:
    (model / "generation_config.json").write_text("{}")


def _add_an_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "what", "touched_only"),
    [
        (_touch, "model.safetensors was written or touched, with the same size and header", True),
        (_touch_config, "config.json was written or touched, with the same size and header", True),
        (_cut_off, "model.safetensors changed: its size went from 15,", False),
        (_rename_a_tensor, "model.safetensors changed: its header is another", False),
        (_edit_config, "config.json changed: its contents are others", False),
        (_remove, "tokenizer.json is gone", False),
        (_add_weights, "more.safetensors is new", False),
        (_add_a_chat_template, "chat_template.jinja is new", False),
        (_add_generation_settings, "generation_config.json is new", False),
        (_add_an_index, "model.safetensors.index.json is new", False),
    ],
)
def test_a_change_is_named(model: Path, change: Callable[[Path], None], what: str, touched_only: bool) -> None:
    before = SourceState.of(model)
    change(model)
    found = before.change_to(SourceState.of(model))
    assert found is not None
    assert found.what.startswith(what)
    assert found.touched_only == touched_only


def test_what_a_run_does_not_read_may_come_and_go(model: Path) -> None:
    before = SourceState.of(model)
    (model / "README.md").write_text("notes")
    (model / "notes.json").write_text("{}")
    assert before.change_to(SourceState.of(model)) is None


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "merges.txt", "tokenizer.model", "tiktoken.model", "hy.tiktoken", "tokenization_hy.py"],
)
def test_texts_that_decide_what_is_written_are_watched(model: Path, name: str) -> None:
    (model / name).write_text("before")
    before = SourceState.of(model)
    (model / name).write_text("behind")
    found = before.change_to(SourceState.of(model))
    assert found is not None
    assert found.what == f"{name} changed: its contents are others"


def test_what_is_no_file_is_not_waited_for(model: Path) -> None:
    """Whoever would read it refuses it."""
    before = SourceState.of(model)
    os.mkfifo(model / "notes.json")
    (model / "folder.json").mkdir()
    (model / "broken.json").symlink_to("nowhere")
    assert before.change_to(SourceState.of(model)) is None


def test_a_state_survives_its_file(model: Path, tmp_path: Path) -> None:
    state = SourceState.of(model)
    state.save(tmp_path / "source.json")
    assert SourceState.load(tmp_path / "source.json") == state


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"config.json": 3}', '{"config.json": {"size": 3}}', "\xff"])
def test_a_damaged_file_holds_no_state(tmp_path: Path, text: str) -> None:
    (tmp_path / "source.json").write_bytes(text.encode("latin-1"))
    assert SourceState.load(tmp_path / "source.json") is None


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere cannot be read"):
        SourceState.of(tmp_path / "nowhere")


def test_a_header_of_absurd_length_is_no_obstacle(model: Path) -> None:
    before = SourceState.of(model)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"\xff" * 8 + data[8:])
    found = before.change_to(SourceState.of(model))
    assert found is not None
    assert found.what == "model.safetensors changed: its header is another"

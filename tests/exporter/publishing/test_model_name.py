"""Outputs are named after the model, wherever its folder lies and however its path is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.hub import resolve_original
from exporter.planning.job import Flags
from exporter.publishing.model_name import local_path, model_name


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A folder of the hub's cache."""
    folder = tmp_path / "models--org--Big-MoE" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    folder.mkdir(parents=True)
    return folder


def test_a_snapshot_of_the_hub_s_cache_has_the_model_s_name(snapshot: Path) -> None:
    assert model_name(str(snapshot)) == model_name(f"{snapshot}/") == "org/Big-MoE"
    assert Flags(model=str(snapshot), budget="20GB").job().out == Path("Big-MoE-20GB")


def test_a_folder_has_its_own_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "tiny" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for model, name in ((".", "inside"), ("..", "tiny"), ("../", "tiny"), ("../inside/.", "inside")):
        assert model_name(model) == name
        assert Flags(model=model, budget="20GB").job().out == Path(f"{name}-20GB")


def test_a_local_model_is_known_by_its_absolute_path_and_a_hub_id_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "toy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("in/toy") == str(tmp_path / "in" / "toy")
    assert local_path("org/Big-MoE") == "org/Big-MoE"


@pytest.mark.parametrize(
    "file",
    [
        "Big-MoE-Q8_0.gguf",
        "Big-MoE.Q4_K_M.gguf",
        "Big-MoE-128x1.5B-Q3_MIX.gguf",
        "Big-MoE-IQ2_XXS-00001-of-00003.gguf",
        "Big-MoE-MXFP4_MOE.gguf",
        "Big-MoE.gguf",
    ],
)
def test_a_gguf_file_has_the_name_that_it_begins_with(file: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    assert model_name(str(tmp_path / file)) == model_name(f"owner/name/{file}") == "Big-MoE"


def test_a_link_to_a_gguf_file_keeps_its_name(tmp_path: Path) -> None:
    """As in the hub's cache, where files are links to others that are named by their hashes."""
    (tmp_path / "blob").touch()
    (tmp_path / "x.gguf").symlink_to(tmp_path / "blob")
    assert local_path(str(tmp_path / "x.gguf")) == str(tmp_path / "x.gguf")


def test_an_original_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone, which these files were made from, is not here; .* --against"):
        resolve_original(None, {"model": str(tmp_path / "gone"), "revision": None})
    assert resolve_original(str(tmp_path), {"model": str(tmp_path / "gone"), "revision": None}) == tmp_path


@pytest.mark.parametrize("length", [231, 255, 5000])
def test_a_name_too_long_for_the_files_beside_it_is_refused(length: int) -> None:
    for flag, arguments in (("--out", {"out": Path("x" * length)}), ("--work-dir", {"work_dir": Path("x" * length)})):
        with pytest.raises(InputError, match=rf"^{flag}: .* has {length} bytes"):
            Flags(budget="1GB", **arguments).job()

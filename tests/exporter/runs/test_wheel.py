"""The built wheel: it carries the demonstration model, and optimum-cli finds our command in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[3]
_REGISTERED = Path("optimum/commands/register/moe_export.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(["-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)], cwd=_REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(folder)]
    _run([*pip, str(wheel)], cwd=folder)
    return folder


def test_the_wheel_holds_the_packages_the_model_and_the_text(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        demo = _REPOSITORY / "exporter" / "demo"
        bundled = [file for file in demo.rglob("*") if file.is_file()]
        assert len(bundled) == 16
        for file in bundled:
            assert archive.read(file.relative_to(_REPOSITORY).as_posix()) == file.read_bytes()
        assert archive.read(_REGISTERED.as_posix()) == (_REPOSITORY / "exporter/optimum_command.py").read_bytes()
    assert {f"{package}/py.typed" for package in ("exporter", "compressors", "validate")} <= names
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"exporter", "compressors", "validate", "optimum"}
    # A file of ours inside optimum other than this one could overwrite one of theirs.
    assert [name for name in names if name.startswith("optimum/")] == [_REGISTERED.as_posix()]


def test_the_sdist_holds_the_same_packages(wheel: Path, tmp_path: Path) -> None:
    """A wheel built from it is the wheel that is built from the repository."""
    _run(["-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)], cwd=_REPOSITORY)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as source, zipfile.ZipFile(wheel) as built:
        held = {name.partition("/")[2] for name in source.getnames()}
        needed = {name for name in built.namelist() if ".dist-info/" not in name and not name.startswith("optimum/")}
        assert needed <= held
    assert {"pyproject.toml", "constraints.txt", "LICENSE", "README.md", "examples/README.md"} <= held


def test_the_installed_command_works_by_itself(installed: Path) -> None:
    (metadata,) = installed.glob("moe_export-*.dist-info")
    run = "from exporter.cli import main; import exporter; print(exporter.__file__); main(prog_name='moe-export')"
    printed = _run(["-c", run, "--version"], cwd=installed)
    assert str(installed) in printed and metadata.name.removesuffix(".dist-info").partition("-")[2] in printed
    plan = [
        *("--budget", "20MB", "--budget-kind", "file", "--quant", "Q4_0"),
        "--dry-run",
        "--out",
        str(installed / "out"),
    ]
    assert "recipe: " in _run(["-c", run, *plan], cwd=installed)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"]])
def test_optimum_cli_passes_its_arguments_to_our_command_line(installed: Path, arguments: list[str]) -> None:
    call = "from exporter.cli import main; main(prog_name='optimum-cli export moe')"
    assert _optimum(installed, ["export", "moe", *arguments]) == _run(["-c", call, *arguments], cwd=installed)


def test_optimum_cli_lists_our_command(installed: Path) -> None:
    assert "moe" in _optimum(installed, ["export", "--help"]).split()


def _optimum(installed: Path, arguments: list[str]) -> str:
    # An editable install has registered the same module already, and optimum loads every one it finds.
    if (Path(sysconfig.get_path("purelib")) / _REGISTERED).exists():
        shutil.rmtree(installed / "optimum", ignore_errors=True)
    return _run(["-m", "optimum.commands.optimum_cli", *arguments], cwd=installed)


def _run(arguments: list[str], cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

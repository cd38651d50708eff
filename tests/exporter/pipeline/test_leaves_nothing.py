"""No network, and no file outside of the output, its work folder and the folder for temporary files.

A run and a validation have a home, a cache and a folder for temporary files of their own, which must be empty
afterwards. Where the system offers it, they have no network either, and strace tells what they open and connect to.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.exporter.found_processes import are_gone, stage_of

Command = Callable[..., Sequence[str]]

_REPOSITORY = Path(__file__).parents[3]
_NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net")
_CALLS = "network,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
_CHANGES = re.compile(r"(O_WRONLY|O_RDWR|O_CREAT|\b(creat|mkdir|mkdirat|rename\w*|link|linkat|symlink\w*)\()")
_PATHS = re.compile(r'"([^"]*)"')


class Place:
    """A folder with a home, a folder for temporary files, and a program that runs with these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.temporary, self._trace = (folder / name for name in ("home", "temporary", "trace"))
        for made in (self.home, self.temporary):
            made.mkdir()
        kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        self.environment = kept | {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "TMPDIR": str(self.temporary),
            # Python's own bytecode would lie in the repository
            "PYTHONPATH": str(_REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command, without network and traced where that can be."""
        return subprocess.run(
            [*self._without_network(), *self._traced(), *command],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def left(self) -> list[Path]:
        """Everything that lies in the home and in the folder for temporary files."""
        return [*self.home.rglob("*"), *self.temporary.rglob("*")]

    def changes(self) -> set[str]:
        """Paths that were written or made, and foreign hosts, in the last command; empty without strace."""
        if not self._trace.exists():
            return set()
        lines = self._trace.read_text(errors="replace").splitlines()
        lines = [line for line in lines if " = -1 E" not in line and "O_TMPFILE" not in line]  # failed; has no name
        hosts = {line for line in lines if "AF_INET" in line}
        changed = (path for line in lines if _CHANGES.search(line) for path in _PATHS.findall(line))
        return hosts | {str(self.folder / path) for path in changed} - {os.devnull}

    def _without_network(self) -> Sequence[str]:
        permitted = shutil.which("unshare") and subprocess.run([*_NO_NETWORK, "true"], check=False).returncode == 0
        return _NO_NETWORK if permitted else ()

    def _traced(self) -> Sequence[str]:
        if shutil.which("strace") is None:
            return ()
        return ("strace", "-f", "-qq", "--seccomp-bpf", "-o", str(self._trace), "-e", f"trace={_CALLS}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def out(place: Place, toy_command: Command, tiny_recipe: Path) -> Path:
    """Runs the tool there and returns its published folder."""
    folder = place.folder / "out"
    done = place.run(toy_command(folder, "--recipe", str(tiny_recipe), "--require", "kld=99,loops=1"))
    assert done.returncode in (0, 4), done.stderr
    return folder


def test_a_run_writes_only_its_output_and_connects_to_nothing(place: Place, out: Path) -> None:
    assert {path.name for path in place.folder.iterdir()} <= {"home", "temporary", "trace", out.name}
    assert place.left() == []
    allowed = (f"{out}", str(place.temporary), "/proc/self/fd/")
    assert [path for path in sorted(place.changes()) if not path.startswith(allowed)] == []


def test_a_validation_writes_nothing_and_connects_to_nothing(place: Place, out: Path, short_text: Path) -> None:
    done = place.run([sys.executable, "-m", "exporter", "validate", str(out), "--text", str(short_text)])
    assert done.returncode in (0, 4), done.stderr
    assert place.left() == []
    assert [path for path in sorted(place.changes()) if not path.startswith(str(place.temporary))] == []


def test_a_killed_run_leaves_no_socket(place: Place, toy_command: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    command = toy_command(tmp_path / "out", "--recipe", str(tiny_recipe))
    run = subprocess.Popen(command, env=place.environment, stderr=subprocess.DEVNULL, start_new_session=True)
    stage = stage_of(run.pid)
    os.killpg(run.pid, signal.SIGKILL)  # the run, its server and its stage, all at once
    run.wait()
    assert are_gone([stage])
    assert place.left() == []


@pytest.mark.parametrize("package", ["compressors", "validate", "exporter", "benchmarks", "compressors.model.errors"])
def test_libraries_are_told_before_they_can_be_imported(package: str, place: Place) -> None:
    script = f"import os, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    done = place.run([sys.executable, "-c", script])
    assert (done.stdout, done.stderr) == ("1 1\n", "")

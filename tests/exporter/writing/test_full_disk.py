"""A full disk: one sentence with the place, the free bytes and the next step, exit code 2, and nothing half done.

A limit on the size of files simulates it, which needs no rights; the system then says EFBIG in place of ENOSPC.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from compressors.model.files.array_file import ArrayFile
from exporter.writing.files import storage_error

Command = Callable[..., Sequence[str]]


@pytest.fixture
def limited() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command whose files may have so many bytes."""

    def run(command: Sequence[str], n_bytes: int, **environment: str) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

        variables = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"} | environment
        return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, preexec_fn=limit)

    return run


def _assert_told(said: str, place: Path, *, goes_on: bool = True) -> None:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(place) in line and "(File too large)" in line and " are free; " in line
    assert "run the same command again" in line
    assert ("it goes on where it stopped" in line) == goes_on
    assert "Traceback" not in said and "please report" not in said and "None" not in said


def test_a_stage_that_cannot_write_says_where_and_how_to_go_on(
    toy_command: Command,
    tiny_recipe: Path,
    tmp_path: Path,
    limited: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    out = tmp_path / "out"
    # enough for the vocabulary that is compared before the work, too little for what calibration stores
    done = limited(toy_command(out, "--recipe", str(tiny_recipe)), 300_000)
    assert done.returncode == 2, done.stderr
    _assert_told(done.stderr, tmp_path / "out.work" / "calibrate.partial")
    assert not out.exists()
    assert (tmp_path / "out.work" / "plan.json").exists()


def test_a_plan_whose_temporary_files_cannot_be_written_says_so(
    toy_command: Command,
    tiny_recipe: Path,
    tmp_path: Path,
    limited: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    command = toy_command(tmp_path / "out", "--recipe", str(tiny_recipe), "--dry-run")
    done = limited(command, 500, TMPDIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    _assert_told(done.stderr, tmp_path, goes_on=False)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def _small_files(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_rows_of_an_array_name_their_file(tmp_path: Path) -> None:
    array = ArrayFile.create(tmp_path / "array.npy", (4, 1000), np.float32)
    with _small_files(100), pytest.raises(OSError) as caught:
        array.write(0, np.ones((4, 1000), np.float32))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "array.npy"))


_WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_bytes(b"x" * 200_000),
    "numpy": lambda path: np.ones(100_000).tofile(path),
    "numpy's own format": lambda path: np.save(path, np.ones(100_000)),
    "safetensors": lambda path: save_file({"x": torch.ones(100_000)}, path),
}


@pytest.mark.parametrize("writer", _WRITERS)
def test_every_library_s_way_to_say_it_is_understood(writer: str, tmp_path: Path) -> None:
    with _small_files(1000), pytest.raises((OSError, SafetensorError)) as caught:
        _WRITERS[writer](tmp_path / "x.npy")
    said = storage_error(caught.value, tmp_path)
    assert said is not None and said.exit_code == 2
    assert "None" not in str(said) and " are free; " in str(said) and "and run the same command again" in str(said)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    assert storage_error(SafetensorError("a tensor is missing"), tmp_path) is None
    assert storage_error(ValueError("No space left on device"), tmp_path) is None

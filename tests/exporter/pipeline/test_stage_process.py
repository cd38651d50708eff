"""The process of a stage: what it has from the run, how its end is known, and that nothing is left when the run ends.

A stage waits for the lock on the work directory before it does anything. A test that holds the lock has all the time
it needs to look at the process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from exporter.pipeline.stage_process import Death, Outcome, run_in_process
from exporter.work.directory import WorkDirectory
from tests.exporter.found_processes import are_gone, stage_of

_REPOSITORY = Path(__file__).parents[3]
_PROGRAM = """
import sys
from pathlib import Path
from exporter.pipeline.stage_process import run_in_process
from exporter.work.directory import WorkDirectory
print("begin", flush=True)
print(run_in_process(WorkDirectory(Path(sys.argv[1])), "calibrate").error)
"""


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    """A work directory without a plan: a stage gets as far as reading it."""
    return WorkDirectory(tmp_path)


@contextmanager
def _waiting(work: WorkDirectory) -> Iterator[tuple[psutil.Process, Future[Outcome | Death]]]:
    """A stage that was started in this process and waits for the lock, and how it will have ended."""
    earlier = psutil.Process().children(recursive=True)
    with ThreadPoolExecutor(1) as threads, work.stage_lock():
        end = threads.submit(run_in_process, work, "calibrate")
        yield stage_of(os.getpid(), earlier), end


@contextmanager
def _program(work: WorkDirectory, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Somebody's script that runs a stage, without the usual ``if __name__ == "__main__"``."""
    script = folder / "script.py"
    script.write_text(_PROGRAM, encoding="utf-8")
    command = [sys.executable, str(script), str(work.folder)]
    variables = os.environ | {"PYTHONPATH": str(_REPOSITORY)} | environment
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, cwd=folder
    ) as process:
        yield process


def _error(work: WorkDirectory) -> str:
    return f"{work.plan_path} is damaged; remove {work.folder} and start again"


def test_the_answer_of_a_stage_arrives_and_its_peak_is_its_own(work: WorkDirectory) -> None:
    held = bytearray(os.urandom(1)) * 1_000_000_000
    outcome = run_in_process(work, "calibrate")
    assert isinstance(outcome, Outcome)
    assert (outcome.error, outcome.exit_code) == (_error(work), 2)
    assert 50_000_000 < outcome.peak_rss_bytes < len(held)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT])
def test_the_signal_that_ended_a_stage_is_known(work: WorkDirectory, number: signal.Signals) -> None:
    with _waiting(work) as (stage, end):
        stage.send_signal(signal.SIGINT)  # is for the run
        stage.send_signal(number)
        death = end.result()
    assert death == Death(-number)
    assert str(death) == f"died with {number.name}"
    assert death.is_a_crash == (number in {signal.SIGSEGV, signal.SIGABRT})


def test_a_stage_finds_the_folder_and_the_standard_error_of_now(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_in_process(work, "calibrate")  # whatever the server began with, it was something else
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    log = tmp_path / "log"
    with capfd.disabled(), _standard_error_in(log), _waiting(work) as (stage, end):
        files = Path(f"/proc/{stage.pid}/fd")
        while (files / "1").readlink() != log:  # the process exists a moment before it is the stage's
            assert not end.done()
            time.sleep(0.02)
        assert (files / "2").readlink() == log
        assert (files / "0").readlink() == Path(os.devnull)
        assert stage.cwd() == str(elsewhere)


@contextmanager
def _standard_error_in(path: Path) -> Iterator[None]:
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def test_a_stage_has_the_environment_of_now(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first process of a group, by an environment variable, takes the lock."""
    run_in_process(work, "calibrate")
    with work.stage_lock():
        monkeypatch.setenv("RANK", "1")
        outcome = run_in_process(work, "calibrate", "group")
    assert isinstance(outcome, Outcome) and outcome.error == _error(work)


def test_the_server_has_neither_threads_nor_runtimes_nor_a_gpu(work: WorkDirectory) -> None:
    with _waiting(work) as (stage, _):
        server = stage.parent()
        assert server is not None and server.ppid() == os.getpid()
        assert server.num_threads() == 1
        mapped = Path(f"/proc/{server.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" in mapped and "scipy" in mapped, "it has imported what stages need"
    for name in ("llama_cpp", "onnxruntime", "/dev/nvidia"):
        assert name not in mapped


def test_a_stage_outlives_its_server_and_the_next_one_has_another(work: WorkDirectory) -> None:
    with _waiting(work) as (stage, end):
        server = stage.parent()
        assert server is not None
        server.kill()
        with suppress(psutil.NoSuchProcess):  # waiting for it is multiprocessing's business
            while server.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
        assert not end.done()
    assert isinstance(end.result(), Outcome)
    with _waiting(work) as (stage, end):
        assert stage.parent() != server


def test_when_both_die_it_is_not_taken_for_a_crash_of_the_stage(work: WorkDirectory) -> None:
    with _waiting(work) as (stage, end):
        server = stage.parent()
        assert server is not None
        server.kill()
        stage.kill()
        death = end.result()
    assert isinstance(death, Death) and not death.is_a_crash


def test_a_program_is_not_run_again_in_its_stage_and_leaves_no_process(work: WorkDirectory, tmp_path: Path) -> None:
    with _program(work, tmp_path) as program:
        with work.stage_lock():
            stage_of(program.pid)
            processes = psutil.Process(program.pid).children(recursive=True)
        printed, said = program.communicate()
    assert (printed, said) == (f"begin\n{_error(work)}\n", "")
    assert are_gone(processes)


def test_a_program_that_is_killed_leaves_no_process(work: WorkDirectory, tmp_path: Path) -> None:
    with _program(work, tmp_path) as program:
        with work.stage_lock():
            stage_of(program.pid)
            processes = psutil.Process(program.pid).children(recursive=True)
            program.kill()
            program.wait()
        assert are_gone(processes)


def test_where_the_server_cannot_listen_stages_are_started_without(work: WorkDirectory, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with _program(work, tmp_path, TMPDIR=str(folder)) as program:
        printed, said = program.communicate()
    assert (printed, said) == (f"begin\n{_error(work)}\n", "")

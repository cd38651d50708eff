"""Faults from outside while a run works: signals, other runs, a changed model, damaged work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

import pytest

from compressors.model.errors import InputError
from exporter.estimating.disk import disk_by_stage, disk_lines
from exporter.file_names import PARTIAL_SUFFIX, SENSITIVITIES, STAGE_RECORD
from exporter.pipeline import running
from exporter.planning.job import Flags, Job
from exporter.planning.plan import Plan
from exporter.progress.views import PlainLines, show_nothing
from exporter.run import run_job
from exporter.stages.table import ALL_STAGES, OF_THE_REPORT
from exporter.work.directory import WorkDirectory
from tests.exporter.forked_program import ForkedProgram
from tests.exporter.found_processes import are_gone, stage_of

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
Command = Callable[..., Sequence[str]]


@dataclass(frozen=True)
class Toy:
    """The toy job, with a model of this module's own, and the work of a run that was kept from publishing."""

    model: Path
    texts: tuple[Path, Path]
    recipe: Path
    work: Path
    fullest: Mapping[str, int]  # the most bytes in the work folder while each stage ran

    def command(self, toy_command: Command, out: Path, *arguments: str) -> Sequence[str]:
        """The job's command line."""
        command = list(toy_command(out, "--recipe", str(self.recipe), *arguments))
        command[3] = str(self.model)
        return command

    def job(self, out: Path) -> Job:
        """The same job, to be run in this process."""
        calibration, text = self.texts
        return Flags(
            model=str(self.model), calibration=calibration, text=text, recipe=self.recipe, out=out, seed=42
        ).job()

    def finished_work(self, out: Path) -> WorkDirectory:
        """A copy of the work, all stages finished, for a run that will build ``out``."""
        folder = out.with_name(f"{out.name}.work")
        shutil.copytree(self.work, folder)
        return WorkDirectory(folder)

    def unfinished_work(self, out: Path, stage: str) -> WorkDirectory:
        """The same, but one stage is to be run again."""
        work = self.finished_work(out)
        shutil.rmtree(work.stage(stage))
        return work


@pytest.fixture(autouse=True)
def server_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are forked even if few are left, because the server is there from an earlier test."""
    monkeypatch.setattr(running, "_FEW", 0)


@pytest.fixture(scope="module")
def toy(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: Path,
    small_texts: tuple[Path, Path],
    tiny_recipe: Path,
    toy_command: Command,
) -> Toy:
    """Runs the job once; its output folder is taken by somebody else before it can publish."""
    folder = tmp_path_factory.mktemp("faults")
    model = Path(shutil.copytree(toy_model, folder / "model"))
    fullest: dict[str, int] = {}
    toy = Toy(model, small_texts, tiny_recipe, folder / "out.work", fullest)
    out = folder / "out"
    with _forked(toy.command(toy_command, out)) as process:
        _wait_for_stage(process, "calibrate")
        out.mkdir()
        watching = Thread(target=_watch, args=(toy.work, process, fullest))
        watching.start()
        said = process.stderr.read()
        assert process.wait() == 2
        watching.join()
    assert f"{out} was made by somebody else meanwhile; move it away and run the same command again" in said
    assert list(out.iterdir()) == []
    return toy


def _watch(work: Path, process: ForkedProgram, fullest: dict[str, int]) -> None:
    """Looks again and again at what lies in a work folder, until the run ends."""
    while process.returncode is None:
        running = {path.name.removesuffix(PARTIAL_SUFFIX) for path in work.glob(f"*{PARTIAL_SUFFIX}")}
        # os.walk passes over folders that go meanwhile, for which Path.rglob raises
        n_bytes = sum(_size(Path(folder, name)) for folder, _, names in os.walk(work) for name in names)
        for stage in running & set(_WHAT):
            fullest[stage] = max(fullest.get(stage, 0), n_bytes)
        time.sleep(0.02)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # gone since it was listed
        return 0


@pytest.fixture(scope="module")
def expected(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA256SUMS of the job."""
    out = tmp_path_factory.mktemp("expected") / "out"
    toy.finished_work(out)
    return _finish(toy, out)


def _finish(toy: Toy, out: Path) -> str:
    """Goes on with the work and returns SHA256SUMS."""
    run_job(toy.job(out), "moe-export", show_nothing)
    return (out / "SHA256SUMS").read_text(encoding="utf-8")


@contextmanager
def _forked(command: Sequence[str]) -> Iterator[ForkedProgram]:
    process = ForkedProgram(command)
    with process.stderr:
        try:
            yield process
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


_Process = ForkedProgram | subprocess.Popen[str]


def _stderr(process: _Process) -> IO[str]:
    assert process.stderr is not None
    return process.stderr


_SMALL_FILES = 500_000  # bytes of records, plans, headers, and of the tokenizer beside the graph
_WHAT = {stage.name: stage.what for stage in ALL_STAGES}


def _wait_for_stage(process: _Process, stage: str) -> None:
    said = []
    for line in _stderr(process):
        said.append(line)
        if line.endswith(f"] {_WHAT[stage]}\n"):
            return
    raise AssertionError("".join(said))


def _parent(process: _Process, number: int) -> None:
    os.kill(process.pid, number)


def _group(process: _Process, number: int) -> None:
    os.killpg(process.pid, number)


def _stage(process: _Process, number: int) -> None:
    stage_of(process.pid).send_signal(number)


_GOES_ON = "stopped; the same command goes on where this run was\n"


@pytest.mark.parametrize(
    ("begin", "to_whom", "number", "code", "said"),
    [
        (_forked, _parent, signal.SIGINT, 130, _GOES_ON),
        (_started, _group, signal.SIGINT, 130, _GOES_ON),  # what a person does most
        (_forked, _group, signal.SIGINT, 130, _GOES_ON),
        (_forked, _parent, signal.SIGTERM, 143, _GOES_ON),
        (_forked, _group, signal.SIGTERM, 143, _GOES_ON),
        (
            _forked,
            _stage,
            signal.SIGTERM,
            1,
            "error: stage recover: its process died with SIGTERM; the same command goes on where this run was\n",
        ),
        (
            _forked,
            _stage,
            signal.SIGKILL,
            1,
            "error: stage recover: its process died with SIGKILL; if nobody killed it, the system ran out of memory: "
            "close other programs or lower --memory; the same command goes on where this run was\n",
        ),
    ],
)
def test_a_signal_ends_the_run_with_one_sentence(
    toy: Toy,
    toy_command: Command,
    tmp_path: Path,
    begin: Callable[[Sequence[str]], AbstractContextManager[_Process]],
    to_whom: Callable[[_Process, int], None],
    number: int,
    code: int,
    said: str,
) -> None:
    out = tmp_path / "out"
    work = toy.unfinished_work(out, "recover")
    with begin(toy.command(toy_command, out)) as process:
        _wait_for_stage(process, "recover")
        stage = stage_of(process.pid)
        to_whom(process, number)
        assert _stderr(process).read() == said
        assert process.wait() == code
        assert are_gone([stage])
    with work.lock():
        assert work.record("compress") is not None
        assert (work.folder / "recover.partial" / "stage.fingerprint").exists()


def test_ctrl_c_before_the_work_says_so_and_leaves_nothing(toy: Toy, toy_command: Command, tmp_path: Path) -> None:
    with _started([*toy.command(toy_command, tmp_path / "out"), "--dry-run"]) as process:
        time.sleep(1)
        _group(process, signal.SIGINT)
        assert _stderr(process).read() == "stopped\n"
        assert process.wait() == 130
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_a_stage_s_own_process_is_no_finding_unless_a_runtime_did_it(
    toy: Toy, toy_command: Command, tmp_path: Path
) -> None:
    """A stage that was killed from outside must not be recorded as a runtime that crashed."""
    out = tmp_path / "out"
    work = toy.unfinished_work(out, "validate_gguf")
    with _forked(toy.command(toy_command, out)) as process:
        _wait_for_stage(process, "validate_gguf")
        _stage(process, signal.SIGTERM)
        assert "stage validate_gguf: its process died with SIGTERM" in _stderr(process).read()
        assert process.wait() == 1
    assert work.record("validate_gguf") is None


def test_two_runs_do_not_get_in_each_other_s_way(
    toy: Toy, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = toy.unfinished_work(out, "recover")
    with _forked(toy.command(toy_command, out)) as process:
        _wait_for_stage(process, "recover")
        _stage(process, signal.SIGSTOP)  # it must last longer than the others take to be refused
        same = run_command(toy.command(toy_command, out))
        assert (same.returncode, same.stderr) == (
            2,
            f"error: another run builds {out} right now; wait for it, or choose another --out\n",
        )
        toy.finished_work(tmp_path / "elsewhere" / "out")
        elsewhere = run_command(toy.command(toy_command, out, "--work-dir", str(tmp_path / "elsewhere")))
        assert (elsewhere.returncode, elsewhere.stderr) == (same.returncode, same.stderr)
        other_out = tmp_path / "other" / "out"
        same_work = run_command(toy.command(toy_command, other_out, "--work-dir", str(tmp_path)))
        assert same_work.returncode == 2
        assert f"another run works in {work.folder} right now" in same_work.stderr
        assert process.returncode is None
    assert not other_out.exists()


def test_work_goes_on_with_another_output_folder(toy: Toy, expected: str, tmp_path: Path) -> None:
    work = toy.finished_work(tmp_path / "first")
    work.folder.rename(tmp_path / "second.work")
    assert _finish(toy, tmp_path / "second") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


@contextmanager
def _put_back(path: Path) -> Iterator[None]:
    """Whatever happens to the file inside, afterwards it is as before, its time of modification included."""
    status, data = path.stat(), path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_model_that_is_cut_off_while_it_is_read(
    toy: Toy, expected: str, toy_command: Command, tmp_path: Path
) -> None:
    out, weights = tmp_path / "out", toy.model / "model.safetensors"
    work = toy.unfinished_work(out, "calibrate")
    size = weights.stat().st_size
    with _put_back(weights):
        with _forked(toy.command(toy_command, out)) as process:
            _wait_for_stage(process, "calibrate")
            stage_of(process.pid)
            os.truncate(weights, size // 2)
            said = _stderr(process).read()
            assert process.wait() == 2
        assert said == (
            f"error: {toy.model} changed while this run was reading it: model.safetensors changed: its size went from "
            f"{size:,} to {size // 2:,} bytes; put the original back and run the same command again, or remove "
            f"{work.folder} to begin anew\n"
        )
        with pytest.raises(InputError, match=r"is not the model that this run began with: model\.safetensors changed"):
            _finish(toy, out)
    assert work.record("calibrate") is None
    assert _finish(toy, out) == expected


def test_a_model_that_is_touched_while_it_is_read_is_read_again(toy: Toy, toy_command: Command, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", toy.model / "model.safetensors"
    toy.unfinished_work(out, "calibrate")
    with _put_back(weights):
        with _forked(toy.command(toy_command, out)) as process:
            _wait_for_stage(process, "calibrate")
            stage_of(process.pid)
            os.utime(weights)
            said = _stderr(process).read()
            assert process.wait() == 2
        assert said.startswith(f"error: {toy.model} changed while this run was reading it: model.safetensors was ")
        assert said.endswith("; the same command starts again from calibrate\n")
        lines: list[str] = []
        with pytest.raises(_Enough):
            run_job(toy.job(out), "moe-export", PlainLines(lambda line: _until(line, "[2/", lines)))
    (place,) = [place for place, line in enumerate(lines) if "starting again" in line]
    assert f"{toy.model}: model.safetensors was written or touched, with the same size and header" in lines[place]
    assert lines[place].endswith("since this run began: starting again from calibrate")
    assert any(line.endswith(f"] {_WHAT['calibrate']}") for line in lines[place:])


def test_a_lock_that_a_killed_run_left_after_publishing_goes(toy: Toy, expected: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy.finished_work(out)
    assert _finish(toy, out) == expected
    out.with_name("out.lock").touch()
    assert _finish(toy, out) == expected
    assert list(tmp_path.iterdir()) == [out]


class _Enough(Exception):
    pass


def _until(line: str, start: str, lines: list[str]) -> None:
    if line.startswith(start):
        raise _Enough
    lines.append(line)


_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\x00garbage{" * 7,
    "half": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("name", ["plan.json", "job.json"])
def test_what_cannot_be_made_again_is_named_when_it_is_damaged(
    toy: Toy, tmp_path: Path, name: str, damage: str
) -> None:
    work = toy.finished_work(tmp_path / "out")
    path = work.folder / name
    path.write_bytes(_DAMAGES[damage](path.read_bytes()))
    with pytest.raises(InputError, match=rf"{path} is damaged; remove {work.folder} and start again"):
        _finish(toy, tmp_path / "out")


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("name", ["source.json", "lock", "stage.lock"])
def test_what_says_nothing_about_results_may_be_damaged(
    toy: Toy, expected: str, tmp_path: Path, name: str, damage: str
) -> None:
    path = toy.finished_work(tmp_path / "out").folder / name
    path.write_bytes(_DAMAGES[damage](path.read_bytes()))
    assert _finish(toy, tmp_path / "out") == expected


def _redone(toy: Toy, out: Path) -> list[str]:
    """Goes on with the work; returns the stages that were announced and not done already."""
    lines: list[str] = []
    run_job(toy.job(out), "moe-export", PlainLines(lines.append))
    return [stage for stage, what in _WHAT.items() if any(line.endswith(f"] {what}") for line in lines)]


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_stage_with_a_damaged_record_is_done_again(toy: Toy, expected: str, tmp_path: Path, damage: str) -> None:
    path = toy.finished_work(tmp_path / "out").stage("compress") / "stage.json"
    path.write_bytes(_DAMAGES[damage](path.read_bytes()))
    assert _redone(toy, tmp_path / "out") == ["calibrate", "compress"], "with the sums that it needs, which went"
    assert (tmp_path / "out" / "SHA256SUMS").read_text(encoding="utf-8") == expected


def test_stages_that_lost_a_file_or_half_of_one_are_done_again(toy: Toy, expected: str, tmp_path: Path) -> None:
    work = toy.finished_work(tmp_path / "out")
    (work.stage("compress") / "expert_map.json").unlink()
    (gguf,) = work.stage("gguf").glob("*.gguf")
    os.truncate(gguf, gguf.stat().st_size // 2)
    assert _redone(toy, tmp_path / "out") == ["calibrate", "compress", "recover", "gguf"]
    assert (tmp_path / "out" / "SHA256SUMS").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_unfinished_stages_give_the_right_result(toy: Toy, expected: str, tmp_path: Path, damage: str) -> None:
    """One stage has a damaged fingerprint; the other, which resumes from its files, has damaged files."""
    work = toy.finished_work(tmp_path / "out")
    for stage in ("compress", "gguf"):
        record = work.record(stage)
        assert record is not None
        partial = work.stage(stage).rename(work.folder / f"{stage}.partial")
        (partial / "stage.json").unlink()
        for path in partial.iterdir():
            path.write_bytes(_DAMAGES[damage](path.read_bytes()))
        fingerprint = record.fingerprint.encode()
        (partial / "stage.fingerprint").write_bytes(
            _DAMAGES[damage](fingerprint) if stage == "compress" else fingerprint
        )
    assert _finish(toy, tmp_path / "out") == expected


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_report_of_a_finished_run_is_not_taken_for_one(toy: Toy, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    toy.finished_work(out)
    _finish(toy, out)
    (out / "report.json").write_bytes(_DAMAGES[damage]((out / "report.json").read_bytes()))
    with pytest.raises(InputError, match=r"out exists and was not written by a finished run; .*, or remove it"):
        _finish(toy, out)


def test_a_finished_stage_leaves_what_it_declares_and_nothing_else(toy: Toy) -> None:
    for stage in ALL_STAGES:
        folder = toy.work / stage.name
        if folder.exists() and SENSITIVITIES not in stage.writes:
            left = {path for path in folder.iterdir() if path.name != STAGE_RECORD}
            declared = {path for file in stage.writes for path in folder.glob(file.pattern.split("/")[0])}
            assert left <= declared, stage.name
            for file in stage.writes:
                if (stage.name, file) in OF_THE_REPORT and not {"{", "}"} & set(file.name):
                    assert file.within(folder).exists(), f"{stage.name}: {file.name}"


def test_the_disk_that_is_announced_is_enough_for_every_stage(toy: Toy) -> None:
    """In memory lie hidden states, and training: there is room for them."""
    plan = Plan.load(toy.work / "plan.json")
    by_stage = disk_by_stage(plan)
    assert set(toy.fullest) <= set(by_stage)
    assert {"calibrate", "recover", "gguf", "onnx", "validate_written", "validate_onnx"} <= set(toy.fullest)
    for stage, n_bytes in toy.fullest.items():
        assert n_bytes < sum(by_stage[stage].values()) + _SMALL_FILES, stage
    assert sum(disk_lines(plan).values()) == max(sum(lines.values()) for lines in by_stage.values())
    on_disk = [sum(n_bytes for what, n_bytes in lines.items() if what != "training") for lines in by_stage.values()]
    assert max(toy.fullest.values()) > 0.5 * max(on_disk), "not far off; a training so short takes no snapshot"
    written = {"gguf files": toy.work.glob("gguf/*.gguf"), "onnx files": toy.work.glob("onnx/onnx/model.onnx*")}
    for what, files in written.items():
        assert sum(map(_size, files)) == by_stage["validate_onnx"][what]
    needless = [*toy.work.glob("calibrate/*"), *toy.work.glob("validate_written/*/*")]
    names = ("routing.safetensors", "summary.json", "last_words.json", "stage.json", "evaluation.safetensors")
    assert {path.name for path in needless} == set(names), "what was needed on the way is gone"

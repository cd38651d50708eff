"""The work directory: finished or absent, one job, one run at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.file_names import LAYER_INPUTS, RUNG_RESULT, TARGETS
from exporter.work.directory import StageRecord, WorkDirectory
from exporter.writing.files import write_atomically

_RECORD = StageRecord(fingerprint="abc", seconds=1.5, peak_rss_bytes=1000)


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    (tmp_path / "work").mkdir()
    return WorkDirectory(tmp_path / "work")


def test_a_stage_is_absent_until_it_is_finished(work: WorkDirectory) -> None:
    assert work.record("gguf") is None
    output = work.begin("gguf", "abc")
    (output / "model.gguf").write_text("weights")
    (output / "below").mkdir()
    (output / "below" / "more").write_text("more")
    assert work.record("gguf") is None
    assert not work.stage("gguf").exists()
    work.finish("gguf", _RECORD)
    assert work.record("gguf") == _RECORD
    assert (work.stage("gguf") / "model.gguf").read_text() == "weights"
    assert (work.stage("gguf") / "below" / "more").read_text() == "more"
    assert not output.exists()


def test_a_killed_attempt_counts_for_nothing_but_is_gone_on_with(work: WorkDirectory) -> None:
    (work.begin("gguf", "abc") / "half").write_text("half")
    assert WorkDirectory(work.folder).record("gguf") is None
    assert (work.begin("gguf", "abc") / "half").read_text() == "half"


@pytest.mark.parametrize("damage", ["", "ab", "another"])
def test_an_attempt_of_other_inputs_is_not_gone_on_with(work: WorkDirectory, damage: str) -> None:
    partial = work.begin("gguf", "abc")
    (partial / "half").write_text("half")
    (partial / "stage.fingerprint").write_text(damage)
    assert not (work.begin("gguf", "abc") / "half").exists()
    (partial / "half").write_text("half")
    assert not (work.begin("gguf", "def") / "half").exists()
    (partial / "half").write_text("half")
    assert not (work.begin("gguf", "def", resumes=False) / "half").exists()


def test_a_file_in_a_stage_s_place_is_removed(work: WorkDirectory) -> None:
    (work.folder / "gguf.partial").write_text("not a folder")
    (work.folder / "gguf").write_text("not a folder")
    assert work.begin("gguf", "abc").is_dir()
    work.finish("gguf", _RECORD)
    assert work.record("gguf") == _RECORD


def test_a_stage_that_lost_a_file_is_not_finished(work: WorkDirectory) -> None:
    (work.begin("gguf", "abc") / "model.gguf").write_text("weights")
    work.finish("gguf", _RECORD)
    assert not (work.stage("gguf") / "stage.fingerprint").exists()
    (work.stage("gguf") / "model.gguf").write_text("weigh")
    assert work.record("gguf") is None
    (work.stage("gguf") / "model.gguf").unlink()
    assert work.record("gguf") is None


def _with_files(work: WorkDirectory) -> Path:
    partial = work.begin("calibrate", "abc")
    for name in ("layer_inputs/layer-000.npy", "layer_inputs/layer-001.npy", "blocks.safetensors", "rung-0.json"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text(name)
    work.finish("calibrate", _RECORD)
    return work.stage("calibrate")


def test_what_was_removed_is_not_missed_and_all_else_is(work: WorkDirectory) -> None:
    folder = _with_files(work)
    work.remove_files("calibrate", [LAYER_INPUTS, RUNG_RESULT, TARGETS])
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.safetensors", "stage.json"]
    assert work.record("calibrate") == _RECORD
    assert work.removed("calibrate") == {"layer_inputs", "rung-{number}.json"}, "targets were never there"
    work.remove_files("calibrate", [TARGETS])
    assert work.record("calibrate") == _RECORD
    (folder / "blocks.safetensors").unlink()
    assert work.record("calibrate") is None
    work.begin("calibrate", "abc")
    assert work.removed("calibrate") == frozenset()


def test_files_that_a_kill_left_while_they_were_removed_are_not_missed(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _with_files(work)
    monkeypatch.setattr("exporter.work.directory._remove", lambda path: None)
    work.remove_files("calibrate", [LAYER_INPUTS])
    assert work.record("calibrate") == _RECORD
    (folder / "layer_inputs" / "layer-000.npy").unlink()
    assert work.record("calibrate") == _RECORD
    (folder / "stage.json.partial").touch()
    assert work.record("calibrate") == _RECORD, "killed while it wrote down what it was about to remove"
    monkeypatch.undo()
    work.remove_files("calibrate", [LAYER_INPUTS])
    assert not (folder / "layer_inputs").exists()


def test_a_file_that_is_handed_over_is_not_missed_and_a_kill_in_between_loses_nothing(work: WorkDirectory) -> None:
    folder = _with_files(work)
    work.begin("gguf", "def")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", _killed)
        with pytest.raises(KeyboardInterrupt):
            work.hand_over("calibrate", LAYER_INPUTS, "gguf")
    assert (folder / "layer_inputs").exists()
    assert work.record("calibrate") == _RECORD
    for _ in range(2):  # the second attempt has it already
        work.hand_over("calibrate", LAYER_INPUTS, "gguf")
        assert not (folder / "layer_inputs").exists()
        assert len(list((work.partial("gguf") / "layer_inputs").iterdir())) == 2
    assert work.record("calibrate") == _RECORD
    assert work.removed("calibrate") == {"layer_inputs"}


def _killed(*_paths: Path) -> None:
    raise KeyboardInterrupt


def test_beginning_again_takes_the_old_result_away(work: WorkDirectory) -> None:
    """Or a crash in the second attempt would leave the first one's outputs for finished."""
    (work.begin("gguf", "abc") / "old").write_text("old")
    work.finish("gguf", _RECORD)
    work.begin("gguf", "abc")
    assert work.record("gguf") is None
    assert not work.stage("gguf").exists()
    work.finish("gguf", _RECORD)
    assert not (work.stage("gguf") / "old").exists()


def test_a_crash_of_the_runtime_is_kept(work: WorkDirectory) -> None:
    record = StageRecord("abc", 1.0, 0, crash="the process died with SIGSEGV")
    work.begin("validate_gguf", "abc")
    work.finish("validate_gguf", record)
    assert work.record("validate_gguf") == record


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"fingerprint": "abc", "color": "red"}', "\xff"])
def test_a_damaged_record_is_no_record(work: WorkDirectory, text: str) -> None:
    work.begin("gguf", "abc")
    work.finish("gguf", _RECORD)
    (work.stage("gguf") / "stage.json").write_bytes(text.encode("latin-1"))
    assert work.record("gguf") is None


_JOB = {"budget_bytes": 20, "model": None, "formats": ["gguf", "onnx"], "require": {"kld": 0.1}, "seed": 0}


def test_the_same_job_may_come_back(work: WorkDirectory) -> None:
    work.claim(_JOB)
    before = (work.folder / "job.json").read_bytes()
    work.claim(dict(reversed(_JOB.items())))
    assert (work.folder / "job.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget_bytes": 21}, "budget_bytes"),
        ({"model": "other"}, "model"),
        ({"formats": ["gguf"]}, "formats"),
        ({"require": {}, "seed": 1}, "require, seed"),
        ({"new_flag": 3}, "new_flag"),
    ],
)
def test_another_job_is_refused_with_what_differs(work: WorkDirectory, change: dict[str, object], named: str) -> None:
    work.claim(_JOB)
    with pytest.raises(InputError, match=rf"belongs to another run \(its {named} differ\): choose another --out"):
        work.claim(_JOB | change)
    work.claim(_JOB)


@pytest.mark.parametrize("text", ["", "{", "[]", '["seed"]', "3", "null", "\xff"])
def test_a_damaged_claim_is_named(work: WorkDirectory, text: str) -> None:
    (work.folder / "job.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"job\.json is damaged; remove .*work"):
        work.claim(_JOB)


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    script = """
import sys
from pathlib import Path
from exporter.work.directory import WorkDirectory
with WorkDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(InputError, match=r"another run works in .*work right now"),
            WorkDirectory(folder).lock(),
        ):
            pass
        other.kill()
    with WorkDirectory(folder).lock():  # a killed run holds nothing
        pass


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    write_atomically(path, "first")
    write_atomically(path, json.dumps({"a": "ü"}))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert [file.name for file in tmp_path.iterdir()] == ["job.json"]

"""Damaged files of every kind from a fixed seed: each is read, or refused in one sentence that names it.

``make fuzz`` gives thousands more to the readers, and to whole commands.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from tests.fuzz.cases import Case
from tests.fuzz.inputs import make_inputs
from tests.fuzz.kinds import KINDS
from tests.fuzz.limits import limited_memory
from tests.fuzz.oracle import complaint_about, judge

_REPOSITORY = Path(__file__).parent.parent.parent
_SEED = 16
_COUNTS = {
    "safetensors": 200,
    "config": 150,
    "index": 40,
    "tokenizer": 120,
    "recipe": 80,
    "published": 60,
    "text": 25,
    "chats": 25,
    "logits": 30,
    "flags": 60,
    "words": 40,
    "gguf": 300,
    "onnx": 200,
}
_GROUP = 100  # cases of a test


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def test_undamaged_inputs_are_read(inputs: Path, tmp_path: Path) -> None:
    """Otherwise the refusals would say nothing."""
    n_read = 0
    for name, kind in KINDS.items():
        for source in kind.sources if kind.damage is not None else ():
            kind.read(inputs / source, random.Random(name), inputs)
            n_read += 1
    assert n_read >= len([kind for kind in KINDS.values() if kind.damage is not None])


@pytest.mark.parametrize(
    ("kind", "first"), [(kind, first) for kind in _COUNTS for first in range(0, _COUNTS[kind], _GROUP)]
)
def test_damaged_inputs_are_read_or_refused(kind: str, first: int, inputs: Path, tmp_path: Path) -> None:
    cases = [Case(kind, number, _SEED) for number in range(first, min(first + _GROUP, _COUNTS[kind]))]
    with limited_memory(4 * 10**9):
        results = {case.name: case.read(inputs, tmp_path) for case in cases}
    complaints = {name: f"{end}: {complaint}" for name, (end, complaint) in results.items() if complaint is not None}
    assert complaints == {}, f"again with: python -m tests.fuzz --seed {_SEED} --case NAME"


def test_whole_commands_end_with_an_exit_code_and_the_figures_are_printed() -> None:
    """In processes of their own: a runtime may die of such a file."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(_SEED), "--inputs", "12", "--every", "2"]
    done = subprocess.run([*command, "--kinds", "gguf", "onnx"], cwd=_REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^command .*\ngguf .*\nonnx ", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 to be complained about"), done.stdout


def test_a_case_is_the_same_every_time(inputs: Path, tmp_path: Path) -> None:
    for kind in ("safetensors", "config", "tokenizer", "recipe", "gguf", "onnx", "published"):
        made = []
        for _ in range(2):
            with Case(kind, 7, _SEED).made(inputs, tmp_path) as (folder, rng):
                files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
                made.append((files, rng.random()))
        assert made[0] == made[1], kind


def _endless() -> None:
    while True:
        pass


def _raising(error: BaseException) -> None:
    raise error


def test_the_judge_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "case" / "input"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tests.fuzz.oracle._CPU_SECONDS", 0.2)
    assert judge(_endless, folder)[0] == "endless"
    assert judge(lambda: _raising(KeyError("x")), folder)[0] == "traceback"
    assert judge(lambda: _raising(BaseException("a panic")), folder)[0] == "traceback"
    assert judge(lambda: (folder.parent / "x").touch(), folder)[0] == "written"
    assert judge(lambda: _raising(InputError(f"{folder}/x is damaged; write it again")), folder) == ("refused", None)
    assert judge(lambda: None, folder) == ("read", None)
    for message in ("--x: a\nb", "--x: \x1b[31m", "--x: " + "y" * 5000, "something is wrong"):
        assert complaint_about(message, folder) is not None, message

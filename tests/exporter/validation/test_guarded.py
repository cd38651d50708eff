"""A guarded process: its end is always reported in one line, and nothing of it is left."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from compressors.model.errors import InputError
from exporter.validation.guarded import Limits, run_guarded
from validate.files.model_file import ModelFile
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.time_limit import tell, working

_FILE = ModelFile("gguf", Path("theirs.gguf"))
_LIMITS = Limits(seconds=60)


def _answer(word: str) -> dict[str, Any]:
    return {"word": word, "backtrace": os.environ["GGML_NO_BACKTRACE"]}


def _assert_as_ggml_does() -> None:
    tell("loading it")
    os.write(2, b"some line\n/tmp/build/ggml.c:12: GGML_ASSERT(n > 0) failed\nand another\n")
    os.abort()


def _leave_without_an_answer() -> None:
    os._exit(0)


def _read_what_is_not_there() -> None:
    {}["ffn_moe_topk"]


def _refuse() -> None:
    raise InputError("theirs.gguf is truncated")


def _open_a_folder() -> None:
    Path("/").read_bytes()


def _ask_for_too_much() -> None:
    np.ones(1 << 30)


def _never_end() -> None:
    tell("running it")
    with working():
        ctypes.CDLL(None).sleep(60)


def _start_another(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        path.write_text(str(process.pid), encoding="ascii")


def test_the_answer_is_plain_data() -> None:
    assert run_guarded(_FILE, _LIMITS, _answer, "yes") == {"word": "yes", "backtrace": "1"}


@pytest.mark.parametrize(
    ("function", "limits", "message"),
    [
        (
            _assert_as_ggml_does,
            _LIMITS,
            "llama.cpp died with SIGABRT while loading it: ggml.c:12: GGML_ASSERT(n > 0) failed",
        ),
        (_leave_without_an_answer, _LIMITS, "llama.cpp ended with code 0 without a message while opening it"),
        (_read_what_is_not_there, _LIMITS, "KeyError: 'ffn_moe_topk' (test_guarded.py:"),
        (_ask_for_too_much, Limits(60, 1 << 30), "it asks for more memory than the 1.1 GB that it may take"),
        (_never_end, Limits(0.5), "llama.cpp was ended, because running it did not come on for 0 s"),
    ],
    ids=["assertion", "no answer", "exception", "memory", "time"],
)
def test_a_death_is_told_in_one_line(function: Callable[[], None], limits: Limits, message: str) -> None:
    with pytest.raises(RuntimeCrashError) as death:
        run_guarded(_FILE, limits, function)
    assert message in str(death.value)
    assert "\n" not in str(death.value)


@pytest.mark.parametrize(
    ("function", "message"), [(_refuse, "theirs.gguf is truncated"), (_open_a_folder, "/: Is a directory")]
)
def test_a_refusal_stays_one(function: Callable[[], None], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        run_guarded(_FILE, _LIMITS, function)
    assert str(refusal.value) == message


def test_ctrl_c_ends_what_the_process_started(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    def interrupt() -> None:
        while not path.exists() or not path.read_text(encoding="ascii"):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_guarded(_FILE, _LIMITS, _start_another, path)
    thread.join()
    with pytest.raises(psutil.NoSuchProcess):
        process = psutil.Process(int(path.read_text(encoding="ascii")))
        if process.status() == psutil.STATUS_ZOMBIE:
            raise psutil.NoSuchProcess(process.pid)
        process.wait(10)


def test_an_honest_file_has_room_and_time(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(1000))
    limits = Limits.of_file(ModelFile("gguf", tmp_path / "x.gguf"), reference_seconds=10.0)
    assert limits.seconds > 200
    assert 0 < (limits.memory_bytes or 0) <= psutil.virtual_memory().available + psutil.swap_memory().free
    assert Limits.of_file(ModelFile("gguf", tmp_path / "x.gguf"), on_gpu=True).memory_bytes is None

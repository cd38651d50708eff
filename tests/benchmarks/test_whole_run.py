"""The texts of both sides of the whole run, the watching and holding of a command, and the goals in the table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.whole_run.control_group import control_group
from benchmarks.whole_run.table import Figures, Part, Side, keep_side, kept_side, record
from benchmarks.whole_run.texts import write_texts
from benchmarks.whole_run.watched import Cost, run_watched
from compressors.calibration.splits import read_splits


def test_both_sides_read_the_same_text(tmp_path: Path, fine_folder: Path) -> None:
    texts = write_texts(fine_folder, tmp_path, n_calibration=10, n_heldout=2)  # asserts the numbers of blocks
    assert read_splits(texts.calibration, texts.heldout).calibration.parts[0].text == texts.statistics.read_text()


_COMMAND = """
import os, subprocess, sys
if len(sys.argv) > 3:
    subprocess.Popen([sys.executable, *sys.argv[:3]], start_new_session=True)  # is left behind, and not waited for
file = os.open(sys.argv[1], os.O_RDONLY)
os.preadv(file, [bytearray(3000)], 0)
os.pread(file, 500, 100)
os.pread(os.open(sys.argv[2], os.O_RDONLY), 500, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="Linux, with a compiler")
def test_reads_of_the_source_are_counted_in_all_processes(tmp_path: Path) -> None:
    source, program = tmp_path / "source", tmp_path / "program.py"
    source.mkdir()
    (source / "weights").write_bytes(bytes(4000))
    (tmp_path / "other").write_bytes(bytes(4000))
    (tmp_path / "out").mkdir()
    os.link(source / "weights", tmp_path / "out/weights")
    program.write_text(_COMMAND)
    cost, watched, _ = run_watched(
        [sys.executable, program, source / "weights", tmp_path / "other", "with a child"],
        {},
        source=source,
        folders=[source, tmp_path / "out"],
        part=lambda: "part",
        library=tmp_path / "reads.so",
    )
    assert watched.reads == {"part": 2 * 3500}
    assert 4000 <= watched.peak_disk < 8000, "the file has two names"
    assert cost.peak_process > 4_000_000 and cost.calls_read >= 2 * 4000
    assert cost.seconds > 0 and cost.cpu_seconds > 0


_WRITES_AND_MAPS = """
import mmap, os, sys
with open(sys.argv[1], "w+b") as file:
    for _ in range(20):
        file.write(b"1" * 4_096_000)
    file.flush()
    os.fsync(file.fileno())
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert pages[::4096] == b"1" * 20_000
"""


def test_a_command_is_held_to_its_memory_with_the_pages_of_files(tmp_path: Path) -> None:
    try:
        with control_group(50_000_000) as group:
            maps, holds = (
                subprocess.run(group.inside([sys.executable, "-c", program, tmp_path / "file"]), check=False)
                for program in (_WRITES_AND_MAPS, "list(bytes(82_000_000))")
            )
            peak = group.peak_bytes
    except SystemExit as error:
        pytest.skip(str(error))
    assert maps.returncode == 0, "pages of a file go and come"
    assert holds.returncode == -signal.SIGKILL, "its own memory does not"
    assert 45_000_000 < peak <= 50_000_000


def test_the_table_says_which_goals_are_reached(tmp_path: Path) -> None:
    tool = Cost(10.0, 15.0, 2 * 10**9, 2 * 10**9, 0, 0, 0, 0)
    theirs = [Part(name, 10.0, 2 * 10**9, cost=tool, peak_disk=10**9) for name in ("convert", "perplexity")]
    whole = Part("all", 26.0, 3 * 10**9, cost=tool, peak_disk=10**9, source_reads=60 * 10**9)
    stages = [
        Part("calibrate", 20.0, 3 * 10**9, source_reads=20 * 10**9),
        Part("teacher_texts", 6.0, 3 * 10**9, source_reads=40 * 10**9),
    ]
    figures = Figures(4 * 10**8, 10.0, 11.0, 0.1, 0.9)
    run = {"shape": "olmoe", "layers": 2, "quant": "Q4_K", "blocks": 64, "chunks": 20, "threads": 2, "memory": "3.5GB"}
    run |= {"instructions": "AVX2"}
    for _ in range(2):  # an equal run is replaced
        record(run, 10**10, Side([whole, *stages], figures), Side(theirs, figures), tmp_path)
    lines = (tmp_path / "whole_run.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("## ") for line in lines) == 1
    goals = lines[lines.index("| goal | allowed | measured | |") + 2 :]
    assert goals[:5] == [
        "| time, of theirs | 1.25 x | 1.30 x | MISSED |",
        "| peak memory | 3.50 GB | 3.00 GB | reached |",
        "| disk: the output and a tenth of the source | 1.40 GB | 1.00 GB | reached |",
        "| reads of the source, without texts | 3 | 2.00 | reached |",
        "| reads for the original's texts | 16 | 4.00 | reached |",
    ]
    assert not any("The kernel held ours" in line for line in lines)
    held = Side([whole, *stages], figures, peak_held=36 * 10**8)
    record(run, 10**10, held, Side(theirs, figures), tmp_path)
    page = (tmp_path / "whole_run.md").read_text(encoding="utf-8")
    assert "| peak memory | 3.50 GB | 3.60 GB | MISSED |" in page and "The kernel held ours" in page


def test_a_side_is_kept_for_an_equal_run(tmp_path: Path) -> None:
    side = Side(
        [Part("all", 26.0, 3 * 10**9, cost=Cost(10.0, 15.0, 2, 2, 0, 0, 0, 0)), Part("calibrate", 20.0, None)],
        Figures(4 * 10**8, 10.0, 11.0, 0.1, 0.9),
        peak_held=7,
    )
    assert kept_side(tmp_path / "ours.json", {"threads": 2}) is None
    keep_side(tmp_path / "ours.json", {"threads": 2}, side)
    assert kept_side(tmp_path / "ours.json", {"threads": 2}) == side
    assert kept_side(tmp_path / "ours.json", {"threads": 1}) is None

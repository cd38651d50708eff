"""A process that maps a large file stays below its limit, computes the same, and knows its size with all of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from validate.runtimes import mapped_pages
from validate.runtimes.drafts import Drafter, Wish
from validate.runtimes.measure import measure_artifact

_REPOSITORY = Path(__file__).parents[3]
_FILE_BYTES, _LIMIT, _AT_MOST = 320_000_000, 150_000_000, 200_000_000  # other tests may hold its thread up
_READER = """
import hashlib, mmap, sys, time
from pathlib import Path
from validate.runtimes.cost import peak_rss_bytes
from validate.runtimes.mapped_pages import bytes_with_all_pages, hold_to

hold_to(None if sys.argv[2] == "none" else int(sys.argv[2]))
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
for _ in range(2):  # in small steps, as a computation does
    digest = hashlib.sha256()
    for start in range(0, len(pages), 1 << 20):
        digest.update(pages[start : start + (1 << 20)])
        time.sleep(0.001)
print(peak_rss_bytes(), bytes_with_all_pages(), digest.hexdigest())
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel alone decides")


def _read(path: Path, limit: int | None) -> tuple[int, int, str]:
    command = [sys.executable, "-c", _READER, str(path), str(limit).lower()]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    peak, with_all, digest = done.stdout.split()
    return int(peak), int(with_all), digest


def test_a_process_that_reads_a_mapped_file_stays_below_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(_FILE_BYTES))
    free_peak, free_bytes, expected = _read(path, None)
    peak, with_all, digest = _read(path, _LIMIT)
    assert digest == expected
    assert peak < _AT_MOST
    assert free_peak > _FILE_BYTES
    assert abs(free_peak - free_bytes) < 20_000_000
    assert abs(with_all - free_bytes) < 10_000_000


@pytest.fixture(scope="module")
def written(fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 8 bits."""
    path = tmp_path_factory.mktemp("written") / "x.gguf"
    write_gguf(Student.teacher(open_source(fine_folder)), "Q8_0", path, name="x", threads=1)
    return path


def test_a_runtime_that_lets_pages_go_tells_the_peak_with_all_of_them(written: Path) -> None:
    free, held = (
        measure_artifact(
            "gguf",
            written,
            context=64,
            kv_type="f16",
            threads=1,
            prompt=np.arange(16),
            memory_bytes=memory_bytes,
        )
        for memory_bytes in (None, 1)
    )
    assert abs(free.peak_rss_bytes - held.peak_rss_bytes) < 10_000_000
    assert held.decode_runs == free.decode_runs


def test_a_process_that_drafts_has_no_pages_of_the_file_while_it_waits(written: Path) -> None:
    drafts, pages = [], []
    for memory_bytes in (None, 1):
        with Drafter("gguf", written, n_texts=1, n_tokens=24, threads=1, memory_bytes=memory_bytes) as drafter:
            drafts.append([drafter.draft([Wish(0, list(range(n)), 4)]) for n in (16, 20)])
            drafting = next(child for child in psutil.Process().children() if str(written) in child.cmdline())
            pages.append(drafting.memory_info().shared)
    assert drafts[0] == drafts[1]
    assert [len(tokens) for (tokens,) in drafts[0]] == [4, 4]
    assert pages[0] - pages[1] > 0.9 * written.stat().st_size


def test_another_limit_takes_the_place_of_the_first() -> None:
    try:
        for limit in (10**12, 10**13):
            mapped_pages.hold_to(limit)
        assert [thread.name for thread in threading.enumerate()].count("mapped pages") == 1
    finally:
        mapped_pages.hold_to(None)

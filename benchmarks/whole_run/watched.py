"""Runs a command and watches it: time, memory, bytes read and written, disk, and reads of a model's files by part."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["Cost", "Watched", "read_into_page_cache", "run_watched"]

_POLL_SECONDS = 0.2
_POLLS_BETWEEN_MEMORY = 50  # mapping 14 GB, a process stands still for a fifth of a second each time
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>

_COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
static unsigned long *total;
static const char *folder;
__attribute__((constructor)) static void start(void) {
    const char *path = getenv("READS_COUNTER");
    folder = getenv("READS_FOLDER");
    int file = path && folder ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *total, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) total = page;
    close(file);
}
static ssize_t counted(int file, ssize_t n_bytes) {
    char link[64], path[4096];
    if (!total || n_bytes <= 0) return n_bytes;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0 && !strncmp(path, folder, strlen(folder))) __atomic_add_fetch(total, n_bytes, __ATOMIC_RELAXED);
    return n_bytes;
}
#define NEXT(name, ...) \
    static ssize_t (*next)(__VA_ARGS__); \
    if (!next) next = (ssize_t (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
ssize_t pread(int f, void *b, size_t n, off_t o) {
    NEXT("pread", int, void *, size_t, off_t); return counted(f, next(f, b, n, o)); }
ssize_t pread64(int f, void *b, size_t n, off64_t o) {
    NEXT("pread64", int, void *, size_t, off64_t); return counted(f, next(f, b, n, o)); }
ssize_t preadv(int f, const struct iovec *v, int n, off_t o) {
    NEXT("preadv", int, const struct iovec *, int, off_t); return counted(f, next(f, v, n, o)); }
ssize_t preadv64(int f, const struct iovec *v, int n, off64_t o) {
    NEXT("preadv64", int, const struct iovec *, int, off64_t); return counted(f, next(f, v, n, o)); }
ssize_t preadv2(int f, const struct iovec *v, int n, off_t o, int flags) {
    NEXT("preadv2", int, const struct iovec *, int, off_t, int); return counted(f, next(f, v, n, o, flags)); }
ssize_t preadv64v2(int f, const struct iovec *v, int n, off64_t o, int flags) {
    NEXT("preadv64v2", int, const struct iovec *, int, off64_t, int); return counted(f, next(f, v, n, o, flags)); }
"""
"""Adds up, in all processes of a run, the bytes that positioned reads take from files below a folder."""


@dataclass(frozen=True)
class Cost:
    """The cost of a command with all its processes; sizes in bytes."""

    seconds: float
    cpu_seconds: float
    peak_process: int  # the largest resident size of any of its processes, mapped pages of files included
    peak_together: int  # of all processes at once, shared pages counted once; sampled every ten seconds
    storage_read: int
    storage_written: int
    calls_read: int  # by read calls, from the page cache or the disk; mapped pages are not in it
    calls_written: int


@dataclass
class Watched:
    """What is seen of a command while it runs."""

    peak_disk: int = 0  # the most bytes on disk of the watched folders
    reads: dict[str, int] = field(default_factory=dict)  # bytes read of the model's files, by part of the run
    peak_together: int = 0


def run_watched(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    *,
    source: Path,
    folders: Sequence[Path],
    part: Callable[[], str],
    library: Path,
    accepted: Sequence[int] = (0,),
) -> tuple[Cost, Watched, str]:
    """Runs a command to its end.

    Args:
        command: the program and its arguments.
        environment: variables beside those of this process.
        source: the folder with the model's files.
        folders: whose size on disk is watched.
        part: names the part of the run that goes on.
        library: where the library that counts reads is compiled, with a file for its count beside it.
        accepted: the exit codes of a run that has come to its end.

    Returns:
        The cost, what was seen, and what the command printed.
    """
    known = _children()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a server that outlives the command is waited for, and counted
    count = _start_counter(library)
    variables = os.environ | environment
    variables |= {"READS_COUNTER": str(_count_file(library)), "READS_FOLDER": f"{source.resolve()}/"}
    variables["LD_PRELOAD"] = " ".join([str(library), *environment.get("LD_PRELOAD", "").split()])
    before, usage, start = _io_counters(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as process:
        watched, ended = Watched(), threading.Event()
        watcher = threading.Thread(target=_watch, args=(watched, ended, process.pid, folders, part, count))
        watcher.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, own = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    peak = max(own.ru_maxrss, _wait_for_others(known))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)
    ended.set()
    watcher.join()
    _count_file(library).unlink()
    if process.returncode not in accepted:
        raise SystemExit(f"{' '.join(map(str, command))}\nexit code {process.returncode}\n{printed}")
    now, after = resource.getrusage(resource.RUSAGE_CHILDREN), _io_counters()
    cpu = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    names = ("read_bytes", "write_bytes", "rchar", "wchar")
    return (
        Cost(seconds, cpu, peak * 1024, watched.peak_together, *(after[name] - before[name] for name in names)),
        watched,
        printed,
    )


def read_into_page_cache(folder: Path) -> None:
    """Reads all files of a folder once, with nothing left to be written behind them."""
    os.sync()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _wait_for_others(known: Collection[int]) -> int:
    """Waits for the processes that the command left, and returns the largest peak in KiB."""
    peak = 0
    while left := _children() - set(known):
        for process in left:
            peak = max(peak, os.wait4(process, 0)[2].ru_maxrss)
    return peak


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _watch(
    watched: Watched,
    ended: threading.Event,
    process: int,
    folders: Sequence[Path],
    part: Callable[[], str],
    count: Callable[[], int],
) -> None:
    seen, name, polls = 0, part(), 0
    while True:
        is_last = ended.wait(_POLL_SECONDS)
        total = count()
        watched.reads[name] = watched.reads.get(name, 0) + total - seen
        seen, name = total, part()
        watched.peak_disk = max(watched.peak_disk, _on_disk(folders))
        if polls % _POLLS_BETWEEN_MEMORY == 0:
            watched.peak_together = max(watched.peak_together, _memory_together(process))
        polls += 1
        if is_last:
            return


def _on_disk(folders: Sequence[Path]) -> int:
    """The bytes of all files; one that stands in several folders takes them once."""
    n_bytes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for directory, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # renamed or removed meanwhile
                    found = os.stat(Path(directory, name))
                    n_bytes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(n_bytes.values())


def _memory_together(process: int) -> int:
    total = 0
    with suppress(psutil.Error):
        for one in (root := psutil.Process(process), *root.children(recursive=True)):
            with suppress(OSError, ValueError):
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def _start_counter(library: Path) -> Callable[[], int]:
    """Compiles the library if it is not there, and sets its count to 0."""
    if not library.exists():
        code = library.with_suffix(".c")
        code.write_text(_COUNTER, encoding="utf-8")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True)
    _count_file(library).write_bytes(bytes(8))
    with _count_file(library).open("r+b") as file:
        page = mmap.mmap(file.fileno(), 8)
    return lambda: int(struct.unpack("=Q", page[:])[0])


def _count_file(library: Path) -> Path:
    return library.with_suffix(f".{os.getpid()}.count")  # other runs have files of their own


def _io_counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}

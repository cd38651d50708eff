"""Several processes that torchrun started work on one run.

    torchrun --nproc-per-node 2 -m exporter MODEL --budget 20GB

The first process plans, runs what one process can do, and writes. It calls the others to the stages that are shared:
there each works on its own token blocks, and sums are reduced (:mod:`compressors.model.parallel`). All see the same
files. torchrun's own store carries the calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from compressors.model.errors import InputError

if TYPE_CHECKING:  # importing torch takes a second, and most runs have no team
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["MOST_THREADS", "Team", "checked_threads", "join_group", "local_processes", "team", "usable_processors"]

_PATIENCE = timedelta(hours=12)  # time to wait for the slowest process in a reduction
_DISMISSED = "dismissed"
_POLL_SECONDS = 0.1


MOST_THREADS = 512
"""ggml's limit (``GGML_MAX_N_THREADS``). If the system cannot start that many, a signal ends the process."""


def checked_threads(threads: int | None) -> int:
    """The number of ``--threads``; None: all processors.

    Raises:
        InputError: it is less than one or more than :data:`MOST_THREADS`.
    """
    if threads is None:
        return usable_processors()
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads: {threads} is outside 1 ... {MOST_THREADS}; leave it out to use all processors")
    return threads


def local_processes() -> int:
    """Processes of the team on this machine, which share its processors and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_processors() -> int:
    """Processors that this process may run on; containers often allow fewer than the machine has.

    Processes that torchrun started here share them.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, max(1, usable // local_processes()))


@contextmanager
def team() -> Iterator[Team | None]:
    """The team that this process belongs to; None when torchrun did not start it, or started it alone.

    When the first process ends, for any reason, the others end too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield None
        return
    members = Team()
    try:
        yield members
    finally:
        if members.leads:
            members.dismiss()


class Team:
    """One process's view of the team."""

    def __init__(self) -> None:
        from torch import distributed

        self.size = int(os.environ["WORLD_SIZE"])
        self.rank = int(os.environ["RANK"])
        hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store = distributed.PrefixStore(  # type: ignore[attr-defined]  # not in its __all__
            f"calls-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            _connect(hosts=self.rank == 0 and not hosted_by_torchrun),
        )
        self._n_calls = 0

    @property
    def leads(self) -> bool:
        """True if this is the first process."""
        return self.rank == 0

    def call(self, what: str) -> str:
        """Calls the others to a stage; returns the name of the group in which all meet there."""
        self._store.set(f"call-{self._n_calls}", what)
        self._n_calls += 1
        return self._group()

    def dismiss(self) -> None:
        """Tells the others to end."""
        self._store.set(f"call-{self._n_calls}", _DISMISSED)

    def calls(self) -> Iterator[tuple[str, str]]:
        """Yields the calls of the first process, as (what, name of the group), until it dismisses the others."""
        while True:
            what = self._next_call()
            if what == _DISMISSED:
                return
            self._n_calls += 1
            yield what, self._group()

    def _next_call(self) -> str:
        key = f"call-{self._n_calls}"
        try:
            while not self._store.check([key]):
                time.sleep(_POLL_SECONDS)
            return self._store.get(key).decode()
        except RuntimeError:  # the store is gone, and the first process with it
            return _DISMISSED

    def _group(self) -> str:
        return f"group-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{self._n_calls}"


@contextmanager
def join_group(name: str, device: torch.device) -> Iterator[None]:
    """Makes this stage's process one of the group's, which meet under ``name``: gloo on CPUs, nccl on GPUs."""
    from torch import distributed

    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore(name, _connect(hosts=False)),  # type: ignore[attr-defined]
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_PATIENCE,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _connect(*, hosts: bool) -> Store:
    from torch import distributed

    store: Store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=hosts, wait_for_workers=False
    )
    return store

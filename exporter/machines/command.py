"""Runs the command ``fits``."""

from __future__ import annotations

from collections.abc import Sequence

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from exporter.estimating.sizes import parse_size
from exporter.hub_headers import folder_with_headers
from exporter.machines.known import MACHINES, Machine, machine_named, machine_of, machine_with
from exporter.machines.rows import Fit, NoFit, fits_on
from exporter.publishing.model_name import model_name

__all__ = ["machines_of", "run_fits"]


def run_fits(
    model: str, revision: str | None, *, offline: bool, machines: Sequence[Machine], context: int, kv_type: str
) -> list[Fit | NoFit]:
    """Returns a row for each machine.

    Args:
        model: a folder, a GGUF file, or a hub id, of which only headers and small files are downloaded.
        revision: of a hub model; None: its newest.
        offline: True takes hub models from the cache only.
        machines: the machines.
        context: tokens of cache to count, at most the model's.
        kv_type: the type of llama.cpp's cache.

    Raises:
        InputError: the model cannot be read, or a flag's value is wrong.
        UnsupportedError: no GGUF file can hold the model.
    """
    with folder_with_headers(model, revision, offline=offline) as path:
        return list(fits_on(machines, open_source(path), model_name(model), context, kv_type))


def machines_of(names: str | None, budgets: str | None, vram: str | None, ram: str | None) -> Sequence[Machine]:
    """The machines that the flags ``--for``, ``--budget``, ``--vram`` and ``--ram`` name; all known ones without them.

    Raises:
        InputError: a name or a size is wrong; the message names the flag.
    """
    machines = [machine_named(name, "--for") for name in names.split(",")] if names else []
    for size in budgets.split(",") if budgets else ():
        machines.append(machine_with(parse_size(size, "--budget"), size.strip()))
    if vram or ram:
        card, memory = (
            None if size is None else parse_size(size, flag) for flag, size in (("--vram", vram), ("--ram", ram))
        )
        machines.append(machine_of(card, memory))
    if len({machine.name for machine in machines}) < len(machines):
        raise InputError("--for, --budget: a machine or a size is named twice; give each once")
    return machines or tuple(MACHINES.values())

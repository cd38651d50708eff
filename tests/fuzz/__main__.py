"""``make fuzz``: thousands of damaged inputs, and a table of the outcomes.

python -m tests.fuzz [--inputs 5000] [--seed 1] [--every 10] [--processes 2]
python -m tests.fuzz --case gguf:17 [--seed 1] [--keep FOLDER]    makes one again and shows what it does
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a damaged name of a model is looked for nowhere

from tests.fuzz.campaign import Outcome, run, run_cases
from tests.fuzz.cases import Case, cases_of
from tests.fuzz.inputs import make_inputs
from tests.fuzz.kinds import KINDS

_ENDS = ("read", "refused", "0", "2", "3", "4", "message", "traceback", "signal", "endless", "written")


def main() -> int:
    """Returns 1 if anything is to be complained about."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damaged inputs from fixed seeds.")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--every", type=int, default=10, help="of each kind every so-manieth input meets a whole command too"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="only these")
    parser.add_argument("--case", help="one input, as KIND:NUMBER")
    parser.add_argument("--keep", type=Path, help="with --case: leave the input in this folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        if given.case is not None:
            return _one(given.case, given.seed, inputs, Path(folder), given.keep)
        return _many(given, inputs, Path(folder))


def _one(name: str, seed: int, inputs: Path, folder: Path, keep: Path | None) -> int:
    kind, _, number = name.partition(":")
    case = Case(kind, int(number), seed)
    if keep is not None:
        with case.made(inputs, folder) as (made, _):
            shutil.copytree(made, keep, symlinks=True)
    complaints = []
    for way in ("read", "command") if case.of_kind.command is not None else ("read",):
        end, complaint = run(case, way, inputs, folder)
        complaints.append(complaint)
        _print(f"{way}: {end}{'' if complaint is None else f': {complaint}'}")
    return int(any(complaints))


def _many(given: argparse.Namespace, inputs: Path, folder: Path) -> int:
    start = time.monotonic()
    cases = [case for case in cases_of(given.inputs, given.seed) if not given.kinds or case.kind in given.kinds]
    outcomes = []
    for outcome in run_cases(cases, inputs, folder, every=given.every, processes=given.processes):
        outcomes.append(outcome)
        if outcome.complaint is not None:
            again = f"python -m tests.fuzz --seed {given.seed} --case {outcome.case.name}"
            _print(f"{again}: {outcome.way}: {outcome.end}: {outcome.complaint}".replace("\n", " | "))
    for way in ("read", "command"):
        _table(way, [outcome for outcome in outcomes if outcome.way == way])
    n_wrong = sum(outcome.complaint is not None for outcome in outcomes)
    _print(
        f"{len(cases)} inputs, {len(outcomes) - len(cases)} of them given to whole commands too, seed {given.seed}: "
    )
    _print(f"{n_wrong} to be complained about; {time.monotonic() - start:.0f} s")
    return int(n_wrong > 0)


def _table(way: str, outcomes: Iterable[Outcome]) -> None:
    counts = Counter((outcome.case.kind, outcome.end) for outcome in outcomes)
    ends = [end for end in _ENDS if any(end == seen for _, seen in counts)]
    _print(f"\n{way:12}" + "".join(f"{end:>10}" for end in ends))
    for kind in KINDS:
        if any(kind == seen for seen, _ in counts):
            _print(f"{kind:12}" + "".join(f"{counts[kind, end]:>10}" for end in ends))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())

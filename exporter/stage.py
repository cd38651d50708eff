"""One stage in a process of its own, so that its peak memory is its own.

    python -m exporter.stage WORK_DIRECTORY STAGE PARENT

reads ``plan.json`` of the work directory, writes into ``STAGE.partial`` and leaves ``outcome.json`` there. It ends by
itself when the run that started it, process PARENT, is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from compressors.model.errors import MoeExportError
from exporter.plan import Plan
from exporter.progress import Progress
from exporter.work import WorkDirectory
from validate.cost import peak_rss_bytes

__all__ = ["OUTCOME", "StageContext"]

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class StageContext:
    """What a stage is given."""

    plan: Plan
    work: WorkDirectory
    output: Path  # the folder to write into
    progress: Progress


def _main(work_folder: Path, name: str, parent: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent answers it, and this ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    work = WorkDirectory(work_folder)
    output = work.folder / f"{name}.partial"
    context = StageContext(Plan.load(work.plan_path), work, output, Progress())
    outcome: dict[str, object] = {"error": None, "exit_code": 0}
    try:
        importlib.import_module(f"exporter.stages.{name.replace('-', '_')}").run(context)
    except MoeExportError as error:
        outcome = {"error": str(error), "exit_code": error.exit_code}
    except MemoryError:
        outcome = {"error": f"stage {name} ran out of memory; lower --memory or close other programs", "exit_code": 1}
    except OSError as error:
        outcome = {"error": f"stage {name}: {error}; free space or choose another --work-dir", "exit_code": 1}
    except Exception:
        outcome = {
            "error": f"internal error in stage {name}, please report it:\n{traceback.format_exc()}",
            "exit_code": 1,
        }
    outcome["peak_rss_bytes"] = peak_rss_bytes()
    (output / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def _end_with(parent: int) -> None:
    # the number is handed over, since the parent may be gone before this process can ask for it
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))

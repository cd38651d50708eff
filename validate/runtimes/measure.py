"""The memory and speed of an artifact in its runtime, measured in a process of the runtime's own.

    python -m validate.runtimes.measure PARENT SECONDS gguf|onnx base
    python -m validate.runtimes.measure PARENT SECONDS gguf|onnx run PATH MEMORY OPTIONS

reads the prompt's token ids from standard input, as a JSON list, and prints one JSON object; MEMORY is the number of
bytes to which the process holds itself while it maps the file, or null, and OPTIONS another object, with the arguments
of the runtime's own ``measure``. The process imports neither torch nor transformers, so its peak is the runtime's; if
the runtime crashes, only this process dies; if a step takes longer than SECONDS, it is ended; and it ends when process
PARENT, which started it, is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.errors import MoeExportError
from compressors.model.files.gguf.gguf_split import split_parts
from validate.files.onnx_files import onnx_bytes
from validate.runtimes import time_limit
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.cost import RuntimeCost, peak_rss_bytes
from validate.runtimes.last_words import telling_line
from validate.runtimes.lifetime import end_with_parent
from validate.runtimes.mapped_pages import hold_to

__all__ = ["RuntimeCrashError", "artifact_bytes", "measure_artifact", "measure_base"]

_RUNTIMES = {"gguf": "validate.runtimes.llama_cpp", "onnx": "validate.runtimes.onnx"}


def measure_base(artifact: str) -> int:
    """Resident bytes of a process that has loaded the artifact's runtime but no model.

    Raises:
        RuntimeCrashError: the runtime does not start.
    """
    return int(_run(artifact, time_limit.patience(0), ["base"])["base_rss_bytes"])


def measure_artifact(
    artifact: str,
    path: Path,
    *,
    context: int,
    kv_type: str,
    threads: int,
    prompt: npt.NDArray[np.int64],
    gpu_layers: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> RuntimeCost:
    """Loads the artifact, fills its KV cache to ``context`` tokens and decodes: memory and speed.

    Args:
        artifact: ``gguf`` or ``onnx``.
        path: the GGUF file, or model.onnx or its folder.
        context: tokens of the KV cache.
        kv_type: type of llama.cpp's KV cache.
        threads: the runtime's threads.
        prompt: token ids to fill the cache with, repeated as needed.
        gpu_layers: layers that llama.cpp puts on a GPU.
        providers: ONNX Runtime's providers; the first that can run a node runs it.
        seconds: the limit of a step of the runtime; None: enough for any valid file.
        memory_bytes: what the process is held to if it maps the file
            (:func:`validate.runtimes.mapped_pages.hold_to`); None: there is no limit. The peak that is returned is
            that of a process that keeps all of the file.

    Raises:
        RuntimeCrashError: the runtime crashed, refused the file or did not end.
    """
    limit = seconds or time_limit.patience(artifact_bytes(artifact, path), context)
    options: dict[str, Any] = {"context": context, "threads": threads}
    if artifact == "gguf":
        options |= {"kv_type": kv_type, "gpu_layers": gpu_layers}
    else:
        options["providers"] = list(providers)
    arguments = ["run", str(path), json.dumps(memory_bytes), json.dumps(options)]
    return RuntimeCost(**_run(artifact, limit, arguments, prompt.tolist()))


def artifact_bytes(artifact: str, path: Path) -> int:
    """The artifact's size on disk; 0 if there is nothing."""
    if artifact == "onnx":
        return onnx_bytes(path)
    return sum(part.stat().st_size for part in split_parts(path) if part.is_file())


def _run(artifact: str, limit: float, arguments: list[str], prompt: Sequence[int] = ()) -> dict[str, Any]:
    command = [sys.executable, "-m", "validate.runtimes.measure", str(os.getpid()), str(limit), artifact, *arguments]
    variables = os.environ | {"GGML_NO_BACKTRACE": "1"}  # a debugger would print for half a minute
    result = subprocess.run(
        command,
        input=json.dumps(prompt),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=variables,
    )
    if result.returncode == -signal.SIGALRM:
        raise RuntimeCrashError(f"the runtime of {artifact} did not finish a step in {limit:,.0f} s and was ended")
    said = telling_line(result.stderr)
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise RuntimeCrashError(f"the runtime of {artifact} died with {name}" + (f": {said}" if said else ""))
    if result.returncode > 0:
        raise RuntimeCrashError(f"the runtime of {artifact} failed: {said or 'it gave no reason'}")
    try:
        answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeCrashError(f"the runtime of {artifact} ended with code 0 without an answer") from None
    return answer


def _main(artifact: str, what: str, *arguments: str) -> None:
    runtime = importlib.import_module(_RUNTIMES[artifact])
    if what == "base":
        answer: dict[str, Any] = {"base_rss_bytes": peak_rss_bytes()}
    else:
        path, memory_bytes, options = arguments
        hold_to(json.loads(memory_bytes))
        answer = asdict(runtime.measure(Path(path), prompt_tokens=json.load(sys.stdin), **json.loads(options)))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    time_limit.set_limit(float(sys.argv[2]))
    try:
        _main(*sys.argv[3:])
    except MoeExportError as error:  # the last printed line becomes the message
        sys.exit(str(error))

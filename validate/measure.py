"""What an artifact costs in its runtime, measured in a process of the runtime's own.

    python -m validate.measure PARENT gguf|onnx base
    python -m validate.measure PARENT gguf|onnx run PATH PROMPT_FILE OPTIONS

prints one JSON object; OPTIONS is one too: what the runtime's own ``measure`` takes. The process imports neither torch
nor transformers, so its peak is the runtime's; when the runtime crashes, only this process dies; and when process
PARENT, which started it, is gone, it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.errors import MoeExportError
from validate.cost import RuntimeCost, peak_rss_bytes
from validate.lifetime import end_with_parent

__all__ = ["RuntimeCrashError", "measure_artifact", "measure_base"]

_RUNTIMES = {"gguf": "validate.llama_cpp", "onnx": "validate.onnx_runtime"}


class RuntimeCrashError(MoeExportError):
    """The runtime died or refused the file; the message says how."""


def measure_base(artifact: str) -> int:
    """Resident bytes of a process that has loaded the artifact's runtime but no model.

    Raises:
        RuntimeCrashError: the runtime does not start.
    """
    return int(_run(artifact, ["base"])["base_rss_bytes"])


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
) -> RuntimeCost:
    """Loads the artifact, fills its KV cache to ``context`` tokens and decodes: memory and speed.

    Args:
        artifact: ``gguf`` or ``onnx``.
        path: the GGUF file, or the folder of model.onnx or that file.
        context: tokens of the KV cache.
        kv_type: type of llama.cpp's KV cache.
        threads: the runtime's threads.
        prompt: token ids to fill the cache with, repeated as needed.
        gpu_layers: layers that llama.cpp puts on a GPU.
        providers: ONNX Runtime's, the first that can run a node runs it.

    Raises:
        RuntimeCrashError: the runtime crashed or refused the file.
    """
    options: dict[str, Any] = {"context": context, "threads": threads}
    if artifact == "gguf":
        options |= {"kv_type": kv_type, "gpu_layers": gpu_layers}
    else:
        options["providers"] = list(providers)
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, prompt, allow_pickle=False)
        file.flush()
        return RuntimeCost(**_run(artifact, ["run", str(path), file.name, json.dumps(options)]))


def _run(artifact: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "validate.measure", str(os.getpid()), artifact, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        raise RuntimeCrashError(f"the runtime of {artifact} died with {signal.Signals(-result.returncode).name}")
    if result.returncode > 0:
        last = result.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise RuntimeCrashError(f"the runtime of {artifact} failed: {last[0]}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _main(artifact: str, what: str, *arguments: str) -> None:
    runtime = importlib.import_module(_RUNTIMES[artifact])
    if what == "base":
        answer: dict[str, Any] = {"base_rss_bytes": peak_rss_bytes()}
    else:
        path, prompt_file, options = arguments
        prompt = np.load(prompt_file, allow_pickle=False).tolist()
        answer = asdict(runtime.measure(Path(path), prompt_tokens=prompt, **json.loads(options)))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    try:
        _main(*sys.argv[2:])
    except MoeExportError as error:  # the last line that is printed becomes the message
        sys.exit(str(error))

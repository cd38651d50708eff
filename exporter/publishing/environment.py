"""The environment of a run: part of report.json."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment"]

_PACKAGES = ("torch", "transformers", "gguf", "llama-cpp-python", "onnx", "onnxruntime", "onnxruntime-gpu")


def environment(threads: int) -> dict[str, Any]:
    """The versions of the libraries, and the machine, as plain data for JSON."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": threads,
        **{package: found for package in _PACKAGES if (found := _installed(package)) is not None},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux tells it in ``/proc/cpuinfo``."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

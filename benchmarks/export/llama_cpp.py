"""llama.cpp's converter and tools, from the sources that llama-cpp-python ships, built once.

The wheel has the libraries only. The sdist of the version that is installed has all of llama.cpp: ``llama-quantize``,
``llama-imatrix`` and ``llama-perplexity`` are compiled from it, the converter is run from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PATIENCE_SECONDS", "Tools", "build_tools", "converter", "patience"]

_PACKAGE = "llama-cpp-python"
_PROGRAMS = ("llama-quantize", "llama-perplexity", "llama-imatrix")

PATIENCE_SECONDS = 2
_PATIENCE = f"""
#include <unistd.h>
__attribute__((destructor)) static void wait_for_the_log(void) {{ sleep({PATIENCE_SECONDS}); }}
"""


@dataclass(frozen=True)
class Tools:
    """The commands, without their arguments."""

    convert: tuple[str, ...]  # SOURCE_FOLDER --outfile FILE --outtype TYPE
    quantize: tuple[str, ...]  # [options] SOURCE TARGET TYPE THREADS
    perplexity: tuple[str, ...]  # -m FILE -f TEXT [options]
    imatrix: tuple[str, ...]  # -m FILE -f TEXT -o TARGET [options]


def build_tools(folder: Path) -> Tools:
    """Downloads and compiles into ``folder`` whatever is not there yet; the first time takes minutes."""
    sources = _unpacked(folder)
    build = folder / f"build-{importlib.metadata.version(_PACKAGE)}"
    quantize, perplexity, imatrix = programs = [build / "bin" / program for program in _PROGRAMS]
    if not all(program.exists() for program in programs):
        _compile(sources, build)
    return Tools(converter(folder), (str(quantize),), (str(perplexity),), (str(imatrix),))


def converter(folder: Path, python: Path = Path(sys.executable)) -> tuple[str, ...]:
    """The command of the converter, which needs no compiling.

    Args:
        folder: has the sources, or gets them.
        python: runs it.
    """
    return str(python), str(Path(__file__).with_name("convert.py")), str(_unpacked(folder))


def patience(folder: Path) -> Path:
    """A library that, preloaded into llama-perplexity, makes it wait before it ends; it is compiled into ``folder``.

    The tool ends without waiting for the thread that writes its log (common/log.cpp): on a busy machine the last lines,
    which are the figures, would be missing.
    """
    library = folder.absolute() / "patience.so"
    if not library.exists():
        source = library.with_suffix(".c")
        source.write_text(_PATIENCE, encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def _unpacked(folder: Path) -> Path:
    """The folder of llama.cpp's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version(_PACKAGE)
    sources = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if not sources.exists():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", _PACKAGE]
        subprocess.run([*download, "--dest", folder, f"{_PACKAGE}=={version}"], check=True)
        with tarfile.open(folder / f"llama_cpp_python-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return sources


def _compile(sources: Path, build: Path) -> None:
    options = {"CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON", "BUILD_SHARED_LIBS": "OFF"}
    options |= {f"LLAMA_BUILD_{part}": "OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")}
    options |= {"LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF"}
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", sources, "-B", build, *definitions], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", build, "--target", *_PROGRAMS, "--parallel", jobs], check=True)

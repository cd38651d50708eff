"""Checks that the installed runtimes can use a GPU, and names the package to install if they cannot."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp.llama_cpp as api
import onnxruntime

from compressors.model.errors import MoeExportError

__all__ = ["PROVIDERS", "MissingGpuError", "check_gpu_layers", "check_provider", "offloads"]

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""The values of ``--providers`` with ONNX Runtime's execution providers; the first that can run a node runs it."""


class MissingGpuError(MoeExportError):
    """A GPU was asked for, and the installed build of a runtime cannot use one: exit code 1."""


def offloads() -> bool:
    """True if llama.cpp was built with a GPU's backend."""
    return bool(api.llama_supports_gpu_offload())


def check_gpu_layers(gpu_layers: int, *, supported: bool | None = None) -> None:
    """Refuses layers on a GPU where llama.cpp was built without one.

    Args:
        gpu_layers: the value of ``--gpu-layers``.
        supported: True if this llama.cpp can use a GPU; None: asks it.

    Raises:
        MissingGpuError: llama.cpp cannot use a GPU.
    """
    if not gpu_layers or (offloads() if supported is None else supported):
        return
    from importlib.metadata import version

    raise MissingGpuError(
        f"--gpu-layers {gpu_layers}: the installed llama-cpp-python {version('llama-cpp-python')} was built for the "
        'CPU only; build it for the GPU with: CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall '
        "--no-binary llama-cpp-python llama-cpp-python (Metal: -DGGML_METAL=on, Vulkan: -DGGML_VULKAN=on), or leave "
        "--gpu-layers out"
    )


def check_provider(name: str, available: Sequence[str] | None = None) -> None:
    """Refuses an execution provider that the installed ONNX Runtime does not have.

    Args:
        name: a key of :data:`PROVIDERS`.
        available: the installed providers; None: asks ONNX Runtime.

    Raises:
        MissingGpuError: the provider is not installed.
    """
    installed = onnxruntime.get_available_providers() if available is None else available
    wanted = PROVIDERS[name][0]
    if wanted not in installed:
        raise MissingGpuError(
            f"--providers {name}: the installed onnxruntime {onnxruntime.__version__} has no {wanted}, only "
            f"{', '.join(installed)}; install the GPU build with: pip uninstall onnxruntime && pip install "
            '"moe-export[gpu]" (onnxruntime-gpu), or leave --providers out'
        )

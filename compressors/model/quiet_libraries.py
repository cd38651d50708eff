"""Keeps libraries from reporting to their makers. The packages of this project import it before anything else.

ONNX Runtime (1.31) resolves a host, and writes a device id and a database below the user's cache folder, as soon as it
is imported: switching its events off after that is too late. The variables are inherited by the processes that a run
starts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Final

__all__ = ["VARIABLES", "leave_no_cache"]

VARIABLES: Final[Mapping[str, str]] = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and with it transformers and optimum
    "DO_NOT_TRACK": "1",  # the common name, which others look for
}
"""The variables that importing this module sets, even against the user's environment."""

os.environ.update(VARIABLES)


def leave_no_cache() -> None:
    """Keeps torch from making an empty folder for compiled code in the folder for temporary files.

    It does so on import, and nothing here is compiled. Call it in programs of this project only: another program may
    need the folder. A folder that the user chose stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())

"""Keeps libraries from reporting to their makers. The packages of this project import it before anything else.

ONNX Runtime (1.31) resolves a host, and writes a device id and a database below the user's cache folder, as soon as it
is imported: switching its events off after that is too late. The variables are inherited by the processes that a run
starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

__all__ = ["VARIABLES"]

VARIABLES: Final[Mapping[str, str]] = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and with it transformers and optimum
    "DO_NOT_TRACK": "1",  # the common name, which others look for
}
"""What importing this module sets, whatever the user's environment says."""

os.environ.update(VARIABLES)

"""A float8 checkpoint is exported to the same bytes as the same model in bfloat16."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.model.checkpoint import Checkpoint
from exporter.inspection import describe

_SAME = ("model.gguf", "onnx/model.onnx", "onnx/model.onnx.data", "onnx/config.json", "onnx/genai_config.json")

"""The modules that the server imports before it forks stages (:mod:`exporter.pipeline.stage_process`): only code.

Neither runtime is among it: just the stages that validate its files load it, and ONNX Runtime starts threads, which a
fork would lose.
"""

# ruff: noqa: F401 - importing is all it is for
from __future__ import annotations

import transformers.modeling_utils  # what all its model classes are made of; with torch it is most of the time
import transformers.models.auto.tokenization_auto  # which the writers of both containers load the tokenizer with

import exporter.stages.calibrate
import exporter.stages.compress
import exporter.stages.gguf
import exporter.stages.onnx
import exporter.stages.recover
import exporter.stages.retune
import exporter.stages.student
import exporter.stages.validate_torch

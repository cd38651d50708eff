"""A student with what the calibration text says of it, and the feedback that its files are written with."""

from __future__ import annotations

from pathlib import Path

import torch

from compressors.calibration.layer_inputs import LayerInputs, write_layer_inputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.statistics import Importance, StatisticsCollector, importance
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student
from exporter.writing.feedback import EmbeddingGradient, StudentFeedback

__all__ = ["Calibrated"]


class Calibrated:
    """Looks at a student's matrices over some blocks of text; layer inputs go into ``folder``."""

    def __init__(self, student: Student, tokens_BT: torch.Tensor, folder: Path) -> None:
        self.student = student
        self.tokens_BT = tokens_BT
        collector = StatisticsCollector(student.spec)
        StreamedModel(student).stream([TokenGroup(tokens_BT, [collector.observe])])
        statistics = [collector.take(layer) for layer in range(student.spec.n_layers)]
        self.importance: Importance = importance(statistics, student.experts.of_itself(), student.spec)
        self.inputs: LayerInputs = write_layer_inputs(StreamedModel(student), tokens_BT, folder)

    def feedback(self, threads: int = 1, gradient: EmbeddingGradient | None = None) -> StudentFeedback:
        """The feedback, as the writers take it."""
        moments = SecondMoments(self.student, self.inputs, threads=threads)
        return StudentFeedback(moments, tied=self.student.spec.tied_embeddings, gradient=gradient)

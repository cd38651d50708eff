"""Second-order error feedback: the codes of a matrix chosen by the second moments of its inputs."""

from __future__ import annotations

from compressors.quantize.feedback.integer_blocks import quantize_blocks_with_feedback
from compressors.quantize.feedback.moments import Feedback, conditioned
from compressors.quantize.feedback.rows import TYPES_WITH_FEEDBACK, quantize_rows_with_feedback, searched_q2_0

__all__ = ["TYPES_WITH_FEEDBACK", "Feedback", "conditioned", "quantize_blocks_with_feedback"]
__all__ += ["quantize_rows_with_feedback", "searched_q2_0"]

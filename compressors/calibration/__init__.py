"""Calibration: texts and their splits, and what one pass over them tells about a model.

Statistics, second moments, layer inputs and the teacher's predictions are gathered here and kept on disk.
"""

"""Stages that run the original: calibration, sensitivities, and the texts that it writes."""

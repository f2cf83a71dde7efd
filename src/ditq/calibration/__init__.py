"""Calibration: activation statistics of the pipeline on prompts, cached and resumable."""

from ditq.calibration.run import calibrate, watch
from ditq.calibration.statistics import GroupStatistics, Statistics

__all__ = ["GroupStatistics", "Statistics", "calibrate", "watch"]

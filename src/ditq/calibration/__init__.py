"""What quantization looks at: activations of the pipeline itself, on prompts, cached and resumable."""

from ditq.calibration.run import calibrate, watch
from ditq.calibration.statistics import GroupStatistics, Statistics

__all__ = ["GroupStatistics", "Statistics", "calibrate", "watch"]

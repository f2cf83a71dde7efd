"""Allocation: the search space, its costs, the strategies that choose, and the study they run in."""

from ditq.allocation.bits import ACTIVATIONS, BY_SCORES, WEIGHTS, Bits, allocate_bits
from ditq.allocation.candidates import Candidates
from ditq.allocation.choices import SIZES, Choices, Gene, Segment
from ditq.allocation.evolution import Evolution
from ditq.allocation.fitness import LATENT, PREDICTION, Fitness, latent_error_db, prediction_error_db
from ditq.allocation.program import Fixed, integer_program, layer_errors, uniform_genomes
from ditq.allocation.scores import MetricKind, Scores
from ditq.allocation.search import SearchResult, search
from ditq.allocation.sensitivity import NO_IMAGES, ImageMetrics, Part, measure_sensitivity
from ditq.allocation.space import Space
from ditq.allocation.study import Measured, Trials, run

__all__ = [
    "ACTIVATIONS", "BY_SCORES", "LATENT", "NO_IMAGES", "PREDICTION", "SIZES", "WEIGHTS", "Bits", "Candidates",
    "Choices", "Evolution", "Fitness", "Fixed", "Gene", "ImageMetrics", "Measured", "MetricKind", "Part",
    "Scores", "SearchResult", "Segment", "Space", "Trials", "allocate_bits", "integer_program", "latent_error_db",
    "layer_errors", "measure_sensitivity", "prediction_error_db", "run", "search", "uniform_genomes",
]  # fmt: skip

"""Group size allocation: the search space, its cost, the search strategies, and the study they run in."""

from ditq.allocation.candidates import Candidates
from ditq.allocation.evolution import Evolution
from ditq.allocation.fitness import LATENT, PREDICTION, Fitness, latent_error_db, prediction_error_db
from ditq.allocation.rivals import Fixed, integer_program, layer_errors, uniform_genomes
from ditq.allocation.search import SearchResult, search
from ditq.allocation.space import SIZES, Space
from ditq.allocation.study import Trials, run

__all__ = [
    "LATENT", "PREDICTION", "SIZES", "Candidates", "Evolution", "Fitness", "Fixed", "SearchResult", "Space", "Trials",
    "integer_program", "latent_error_db", "layer_errors", "prediction_error_db", "run", "search", "uniform_genomes",
]  # fmt: skip

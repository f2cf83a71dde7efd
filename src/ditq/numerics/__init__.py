"""Quantization as pure functions on tensors: codes and scales, packing, rotations, clipping, smoothing, errors."""

from ditq.numerics.clipping import search_clip_ratio
from ditq.numerics.codebook import nearest_level, normal_levels
from ditq.numerics.codebook import warm as warm_levels
from ditq.numerics.error import relative_error, sqnr_db
from ditq.numerics.gptq import Rounded, add_inputs, gptq, inverse_factor, output_errors
from ditq.numerics.grid import Grid, code_range
from ditq.numerics.hadamard import (
    Rotation,
    RotationKind,
    hadamard_matrix,
    is_supported,
    largest_block,
    largest_regular_block,
    rotate,
    rotation_matrix,
    scaled_signs,
    signs,
    unrotate,
    warm,
)
from ditq.numerics.incoherence import channel_imbalance, incoherence
from ditq.numerics.lowrank import low_rank
from ditq.numerics.packing import pack, packed_bytes, unpack
from ditq.numerics.salience import rank_correlation, salience_weights
from ditq.numerics.smoothing import smoothing_scale
from ditq.numerics.uniform import (
    Quantized,
    check_finite,
    dequantize,
    fake_quantize,
    group_view,
    not_finite,
    quantize,
    scale_and_zero_point,
)

__all__ = [
    "Grid",
    "RotationKind",
    "Quantized",
    "Rotation",
    "Rounded",
    "add_inputs",
    "channel_imbalance",
    "check_finite",
    "code_range",
    "dequantize",
    "fake_quantize",
    "gptq",
    "group_view",
    "hadamard_matrix",
    "warm",
    "incoherence",
    "inverse_factor",
    "is_supported",
    "largest_block",
    "largest_regular_block",
    "low_rank",
    "nearest_level",
    "normal_levels",
    "not_finite",
    "output_errors",
    "pack",
    "packed_bytes",
    "quantize",
    "rank_correlation",
    "relative_error",
    "rotate",
    "rotation_matrix",
    "salience_weights",
    "scaled_signs",
    "scale_and_zero_point",
    "search_clip_ratio",
    "signs",
    "smoothing_scale",
    "sqnr_db",
    "unpack",
    "unrotate",
    "warm_levels",
]

"""W8A8-style linears with ``torch._int_mm``: int8 x int8 -> int32, rescaled by an outer product of scales.

All bit widths from 2 to 8 run on the 8-bit integer path; fewer bits save memory, not time. Codes of normal levels are
integers of 8 bits themselves, which a table maps to fewer bits in memory. A token with NaN or Inf
has a scale that is not finite, so its output has no finite number.
"""

from __future__ import annotations

import math
import platform
from functools import cache

import torch
from torch import Tensor

from ditq.engines.base import Engine, QuantizedWeight, balance
from ditq.engines.torch.fused import quantize_rows, rescale_, row_slices, weight_codes
from ditq.numerics import Grid, Quantized, Rotation, dequantize, not_finite, quantize, unpack

# Up to this K, int32 accumulators hold K products of 8-bit codes minus their zero points (at most 255 * 255 each)
# without overflow.
MAX_COLUMNS = (2**31 - 1) // (255 * 255)

# Of one product in float32: see exact_float_product.
_EXACT_COLUMNS = 2**10


class TorchEngine(Engine):
    """Reference for the other engines; deterministic, since integer sums do not depend on their order."""

    name = "torch"
    priority = 0

    def why_unavailable(self) -> str | None:
        if not hasattr(torch, "_int_mm"):
            return f"torch {torch.__version__} has no _int_mm; install torch>=2.6"
        return None

    def why_unsupported(self, weight: Grid, activation: Grid | None, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda", "meta"):
            return f"torch._int_mm runs on cpu and cuda, not on {device.type}"
        return None

    def quantize_activations(self, x: Tensor, format: Grid, scale: Tensor | None) -> Quantized:
        if scale is None and format.granularity != "tensor":
            return quantize_rows(x, format)
        quantized = quantize(x, format, scale=scale)
        # A static scale does not depend on this input: it would turn NaN and Inf into plausible numbers.
        return quantized if scale is None else quantized._replace(scale=quantized.scale + not_finite(x))

    def quantize_input(
        self, x: Tensor, smooth: Tensor | None, rotation: Rotation | None, format: Grid, scale: Tensor | None
    ) -> Quantized:
        if rotation is not None or scale is not None or format.granularity == "tensor":
            return self.quantize_activations(balance(x, smooth, rotation), format, scale)
        return quantize_rows(x, format, smooth)  # smoothing is one more pass over what is in the cache

    def linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, w_zero = weight_codes(weight)
        return grouped_products(x, codes, weight.scale, w_zero, bias).to(dtype)

    def dequantize_weight(self, weight: QuantizedWeight) -> Tensor:
        codes = unpack(weight.packed, weight.format, weight.columns)
        return dequantize(Quantized(codes, weight.scale, weight.zero_point, weight.format))


def grouped_products(
    x: Quantized, codes: Tensor, w_scale: Tensor, w_zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``x @ w.T + bias``, float32 [M, N], by one integer product for each run of columns with common scales.

    The products of a few rows are rescaled and summed while they are in the cache, group by group.

    Args:
        codes: of the weight, int8 [N, K]; w_scale: float32 [N, G] or [1, 1]; w_zero: int8 likewise, or None.
    """
    m, n = len(x.codes), len(codes)
    parts = math.lcm(x.scale.shape[1], w_scale.shape[1])
    if parts == 1:
        outer_products = zero_corrections(
            x.codes, None if x.zero_point is None else x.zero_point.int(),
            codes, None if w_zero is None else w_zero.int()[:, 0],
        )  # fmt: skip
        acc = integer_product(x.codes, codes)
        return rescale_(acc, x.scale, w_scale[:, 0], outer_products, None if bias is None else bias.float())
    # [G, rows, columns of a group]: every operand of a product is contiguous.
    x_parts, w_parts = (t.unflatten(1, (parts, -1)).transpose(0, 1).contiguous() for t in (x.codes, codes))
    x_scales, w_scales = _of_parts(x.scale, parts), _of_parts(w_scale, parts)
    x_zeros = None if x.zero_point is None else _of_parts(x.zero_point.int(), parts)
    w_zeros = None if w_zero is None else _of_parts(w_zero.int(), parts)
    corrections = [
        zero_corrections(
            x_parts[i], None if x_zeros is None else x_zeros[i][:, None],
            w_parts[i], None if w_zeros is None else w_zeros[i],
        )
        for i in range(parts)
    ]  # fmt: skip
    total = codes.new_zeros(m, n, dtype=torch.float32) if bias is None else bias.float().repeat(m, 1)
    for rows in row_slices(total):
        total_rows = total[rows]
        for i in range(parts):
            acc = integer_product(x_parts[i, rows], w_parts[i])
            for row, column in corrections[i]:
                acc.addcmul_(row[rows] if len(row) == m else row, column, value=-1)
            x_scale = x_scales[i, rows, None] if x_scales.shape[1] == m else x_scales[i, :, None]
            # Converts to floats in the memory of the integers, which have the same width.
            total_rows.addcmul_(acc.view(torch.float32).copy_(acc).mul_(x_scale), w_scales[i])
    return total


def _of_parts(values: Tensor, parts: int) -> Tensor:
    """Scales or zero points [R, G] for each of ``parts`` runs of columns: [parts, R], contiguous."""
    return values.repeat_interleave(parts // values.shape[1], 1).t().contiguous()


def zero_corrections(
    x: Tensor, x_zero: Tensor | None, w: Tensor, w_zero: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """The terms of zero points to subtract from ``x @ w.T`` [M, N], as outer products of int32 vectors.

    sum_k (x - z_x) (w - z_w) = sum x w - (sum x - K z_x) z_w - z_x sum w
    """
    corrections = []
    if w_zero is not None:
        row_sum = code_sums(x)[:, None]
        corrections.append((row_sum if x_zero is None else row_sum - x.shape[1] * x_zero, w_zero))
    if x_zero is not None:
        corrections.append((x_zero, code_sums(w)))
    return corrections


def code_sums(codes: Tensor) -> Tensor:
    """Row sums, int32, by a product with ones: ten times faster than ``sum`` on a CPU."""
    return integer_product(codes, torch.ones(1, codes.shape[1], dtype=torch.int8, device=codes.device))[:, 0]


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` of int8 [M, K] and int8 [N, K], int32 [M, N]; pads if the backend needs multiples of 8.

    Raises:
        ValueError: K is so large that an int32 sum could overflow.
    """
    m, k = x.shape
    n = w.shape[0]
    if k > MAX_COLUMNS:
        raise ValueError(f"in_features must be at most {MAX_COLUMNS} for int32 accumulation, got {k}")
    if m == 0:
        return torch.zeros(0, n, dtype=torch.int32, device=x.device)
    if x.device.type == "cuda":
        # cuBLASLt needs more than 16 rows, and multiples of 8 in the other dimensions.
        pad_m, pad_k, pad_n = max(0, 17 - m), -k % 8, -n % 8
        if pad_m or pad_k or pad_n:
            x = torch.nn.functional.pad(x, (0, pad_k, 0, pad_m))
            w = torch.nn.functional.pad(w, (0, pad_k, 0, pad_n))
            return torch._int_mm(x.contiguous(), w.t())[:m, :n].contiguous()
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and _lacks_vnni() and _floats_are_exact():
        return exact_float_product(x, w)
    return torch._int_mm(x.contiguous(), w.t())


def exact_float_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` of int8 [M, K] and int8 [N, K], int32 [M, N], by float32 products that round nothing.

    A product of two 8-bit codes is at most 2^14, so a sum of 2^10 of them is an integer of at most 2^24, which float32
    holds exactly, in any order. CPUs without integer dot products (VNNI) multiply floats several times as fast.
    """
    total = None
    for begin in range(0, x.shape[1], _EXACT_COLUMNS):
        columns = slice(begin, begin + _EXACT_COLUMNS)
        part = x[:, columns].float() @ w[:, columns].float().t()
        # The integers go to the memory of the floats, which have the same width: each is read before it is written.
        integers = part.view(torch.int32).copy_(part)
        total = integers if total is None else total.add_(integers)
    return total if total is not None else x.new_zeros(len(x), len(w), dtype=torch.int32)


@cache
def _lacks_vnni() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()


def _floats_are_exact() -> bool:
    """Whether torch multiplies float32 numbers as such: not as bfloat16, by autocast or by a setting."""
    setting = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none")
    exact = torch.get_float32_matmul_precision() == "highest" and setting in ("none", "ieee")
    return exact and not torch.is_autocast_enabled("cpu")

"""W8A8-style linears with ``torch._int_mm``: int8 x int8 -> int32, rescaled by an outer product of scales.

All bit widths from 2 to 8 run on the 8-bit integer path; fewer bits save memory, not time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditq.engines.base import Engine, QuantizedWeight
from ditq.engines.torch.fused import quantize_tokens, rescale_, weight_codes
from ditq.numerics import Quantized, dequantize, quantize, unpack
from ditq.plan import TensorFormat

# int32 accumulators hold K products of 8-bit codes with 8-bit codes, minus their zero points
# (at most 255 * 255 each), without overflow up to this K.
MAX_COLUMNS = (2**31 - 1) // (255 * 255)


class TorchEngine(Engine):
    """Reference for the other engines; deterministic, since integer sums do not depend on their order."""

    name = "torch"
    priority = 0

    def why_unavailable(self) -> str | None:
        if not hasattr(torch, "_int_mm"):
            return f"torch {torch.__version__} has no _int_mm; install torch>=2.6"
        return None

    def why_unsupported(
        self, weight: TensorFormat, activation: TensorFormat | None, device: torch.device
    ) -> str | None:
        if device.type not in ("cpu", "cuda", "meta"):
            return f"torch._int_mm runs on cpu and cuda, not on {device.type}"
        return None

    def quantize_activations(self, x: Tensor, format: TensorFormat, scale: Tensor | None) -> Quantized:
        fast = format.granularity == "token" and format.symmetric and scale is None
        if fast:
            return quantize_tokens(x, format.bits)
        return quantize(
            x,
            format.bits,
            symmetric=format.symmetric,
            granularity=format.rows,
            group_size=format.group_size,
            scale=scale,
        )

    def linear(
        self,
        x: Quantized,
        x_format: TensorFormat,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, w_zero = weight_codes(weight)
        x_groups, w_groups = x.scale.shape[1], weight.scale.shape[1]
        parts = math.lcm(x_groups, w_groups)
        step = weight.columns // parts
        total = None if bias is None else bias.float()
        for part in range(parts):
            columns = slice(part * step, (part + 1) * step)
            i, j = part * x_groups // parts, part * w_groups // parts
            x_part, w_part = x.codes[:, columns], codes[:, columns]
            x_zero = None if x.zero_point is None else x.zero_point[:, i : i + 1].int()
            corrections = zero_corrections(x_part, x_zero, w_part, None if w_zero is None else w_zero[:, j].int())
            acc = integer_product(x_part, w_part)
            total = rescale_(acc, x.scale[:, i : i + 1], weight.scale[:, j], corrections, total)
        assert total is not None
        return total.to(dtype)

    def dequantize_weight(self, weight: QuantizedWeight) -> Tensor:
        codes = unpack(weight.packed, weight.format.bits, weight.columns)
        quantized = Quantized(codes, weight.scale, weight.zero_point)
        return dequantize(quantized, weight.format.rows, weight.format.group_size)


def zero_corrections(
    x: Tensor, x_zero: Tensor | None, w: Tensor, w_zero: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """What zero points subtract from ``x @ w.T`` [M, N], as outer products of int32 vectors.

    sum_k (x - z_x) (w - z_w) = sum x w - (sum x - K z_x) z_w - z_x sum w
    """
    found = []
    if w_zero is not None:
        row_sum = code_sums(x)[:, None]
        found.append((row_sum if x_zero is None else row_sum - x.shape[1] * x_zero, w_zero))
    if x_zero is not None:
        found.append((x_zero, code_sums(w)))
    return found


def code_sums(codes: Tensor) -> Tensor:
    """Sums of rows, int32, by a product with ones: ten times faster than ``sum`` on a CPU."""
    return integer_product(codes, torch.ones(1, codes.shape[1], dtype=torch.int8, device=codes.device))[:, 0]


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` of int8 [M, K] and int8 [N, K], int32 [M, N]; pads where the backend wants multiples of 8.

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
        # cuBLASLt wants more than 16 rows and multiples of 8 elsewhere.
        pad_m, pad_k, pad_n = max(0, 17 - m), -k % 8, -n % 8
        if pad_m or pad_k or pad_n:
            x = torch.nn.functional.pad(x, (0, pad_k, 0, pad_m))
            w = torch.nn.functional.pad(w, (0, pad_k, 0, pad_n))
            return torch._int_mm(x.contiguous(), w.t())[:m, :n].contiguous()
    return torch._int_mm(x.contiguous(), w.t())

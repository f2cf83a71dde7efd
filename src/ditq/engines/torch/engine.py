"""W8A8-style linears with ``torch._int_mm``: int8 x int8 -> int32, rescaled by an outer product of scales.

All bit widths from 2 to 8 run on the 8-bit integer path; fewer bits save memory, not time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditq.engines.base import Engine, QuantizedWeight
from ditq.numerics import Quantized, code_range, dequantize, quantize, unpack
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
        codes = unpack(weight.packed, weight.format.bits, weight.columns)  # int8 [N, K]
        x_groups, w_groups = x.scale.shape[1], weight.scale.shape[1]
        parts = math.lcm(x_groups, w_groups)
        step = weight.columns // parts
        total: Tensor | None = None
        for part in range(parts):
            columns = slice(part * step, (part + 1) * step)
            i, j = part * x_groups // parts, part * w_groups // parts
            product = _rescaled_product(
                x.codes[:, columns],
                x.scale[:, i],
                None if x.zero_point is None else x.zero_point[:, i],
                codes[:, columns],
                weight.scale[:, j],
                None if weight.zero_point is None else weight.zero_point[:, j],
                bias if part == 0 else None,
            )
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.to(dtype)

    def dequantize_weight(self, weight: QuantizedWeight) -> Tensor:
        codes = unpack(weight.packed, weight.format.bits, weight.columns)
        quantized = Quantized(codes, weight.scale, weight.zero_point)
        return dequantize(quantized, weight.format.rows, weight.format.group_size)


def quantize_tokens(x: Tensor, bits: int) -> Quantized:
    """Symmetric codes per token, in fewer passes over memory than ``numerics.quantize``, equal to it bit by bit."""
    top = code_range(bits, True)[1]
    x = x.float()
    # Two reductions beat abs() or an infinity norm by a factor of four on a CPU.
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    # A row of zeros (padding) has no range: any positive scale will do, its codes are zero.
    scale = torch.where(largest > 0, (largest / top).clamp_min(torch.finfo(torch.float32).tiny), 1.0 / top)
    codes = (x / scale).round_().clamp_(-top, top).to(torch.int8)
    return Quantized(codes, scale, None)


def _rescaled_product(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """One group's share of the output, float32 [M, N].

    sum_k s_x (x - z_x) s_w (w - z_w) = s_x s_w (sum x w - z_w sum x - z_x sum w + K z_x z_w); the
    bracket stays in int32, where it is exact.
    """
    acc = integer_product(x, w)
    if w_zero is not None:
        row_sum = x.sum(-1, dtype=torch.int32)
        if x_zero is not None:
            row_sum = row_sum - x.shape[1] * x_zero.int()
        acc.addr_(row_sum.expand(len(x)), w_zero.int().expand(len(w)), alpha=-1)
    if x_zero is not None:
        acc.addr_(x_zero.int().expand(len(x)), w.sum(-1, dtype=torch.int32), alpha=-1)
    # In place from here: fresh memory of this size costs as much as the arithmetic.
    y = acc.float().mul_(x_scale[:, None])
    return y.mul_(w_scale) if bias is None else torch.addcmul(bias.float(), y, w_scale, out=y)


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

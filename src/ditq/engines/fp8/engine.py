"""Linears by ``torch._scaled_mm``: inputs and weights in e4m3, one scale per token and one per output channel.

The engine does not compute the plan's integers: e4m3 keeps four significant bits of every number, whatever the scale.
Weights of up to 4 bits are exact in e4m3; other weights, and all inputs, are rounded once more. For smoothed or
rotated inputs int8 is more accurate, at the same theoretical speed. This engine is for comparison, and for GPUs and
layers on which it is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ditq.engines.base import Engine, QuantizedWeight, too_old
from ditq.engines.torch.engine import TorchEngine
from ditq.engines.torch.fused import weight_codes
from ditq.numerics import Grid, Quantized

KIND = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_CAPABILITY = (8, 9)  # Ada and Hopper
STEP = 16  # cuBLAS needs multiples of this of input and output features


class Fp8Engine(TorchEngine):
    """On a CPU it computes the same numbers by float products, for tests."""

    name = "fp8"
    priority = -20  # opt-in: below all other engines
    note = "opt-in: use_engine('fp8'); on a CPU it multiplies floats, for tests"

    def why_unavailable(self) -> str | None:
        if not hasattr(torch, "_scaled_mm"):
            return f"torch {torch.__version__} has no _scaled_mm; install torch>=2.6"
        if torch.version.hip is not None:
            return "it is written for NVIDIA GPUs, and this torch is built for AMD"
        return None

    def why_unsupported(self, weight: Grid, activation: Grid | None, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda", "meta"):
            return f"torch._scaled_mm runs on cuda, not on {device.type}"
        if weight.levels != "uniform" or (activation is not None and activation.levels != "uniform"):
            return "normal levels are integers of 8 bits, which e4m3 would round; use another engine"
        if weight.full or (activation is not None and activation.full):
            return "its products have positive scales, and those of full grids may be negative"
        if weight.granularity == "group" or (activation is not None and activation.granularity == "group"):
            return "its products have one scale per token and one per output channel, no groups"
        if activation is not None and activation.bits != 8:
            return f"its inputs have 8 bits, not {activation.bits}"
        if device.type == "cuda":
            return too_old(device, SMALLEST_CAPABILITY, "products of 8-bit floats")
        return None

    def prove(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else difference(device)

    quantize_input = Engine.quantize_input  # not that of the torch engine, which makes integers

    def quantize_activations(self, x: Tensor, format: Grid, scale: Tensor | None) -> Quantized:
        """Floats e4m3 [M, K] and their scales [M, 1]; always symmetric, and per token unless static.

        A row with NaN or Inf becomes a row of NaN.
        """
        x = x.float()
        if scale is None:
            largest = x.abs().amax(1, keepdim=True)
            scale = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        else:
            # A static scale is that of integers up to 127.
            scale = (scale * (127 / LARGEST)).expand(len(x), 1)
        return Quantized((x / scale).clamp(-LARGEST, LARGEST).to(KIND), scale, None, format)

    def linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w_scale = weight.scale.expand(len(weight.packed), 1)
        y = scaled_product(x.codes, float8_weight(weight), x.scale, w_scale)
        return (y if bias is None else y + bias).to(dtype)


def float8_weight(weight: QuantizedWeight) -> Tensor:
    """Codes minus zero points, e4m3 [N, K]; exact up to 16."""
    codes, zero = weight_codes(weight)
    values = codes.to(torch.bfloat16)  # exact, as is the difference: at most 255
    return (values if zero is None else values - zero.to(torch.bfloat16)).to(KIND)


def scaled_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """``(x_scale x) @ (w_scale w).T`` [M, N] of e4m3 [M, K] and [N, K]; bf16 on a GPU, float32 on a CPU.

    Args:
        x_scale: float32 [M, 1]; w_scale: float32 [N, 1].
    """
    if x.device.type == "cpu":
        return (x.float() @ w.float().t()) * x_scale * w_scale.t()
    (m, k), n = x.shape, w.shape[0]
    if m == 0:
        return torch.empty(0, n, dtype=torch.bfloat16, device=x.device)
    if k % STEP or n % STEP:
        x, w = _padded(x, 0, -k % STEP), _padded(w, -n % STEP, -k % STEP)
        w_scale = F.pad(w_scale, (0, 0, 0, -n % STEP))
    y = torch._scaled_mm(
        x.contiguous(), w.t(), scale_a=x_scale.contiguous(), scale_b=w_scale.t().contiguous(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y if y.shape[1] == n else y[:, :n]


def difference(device: torch.device) -> str | None:
    """An error of products on this device, of sizes with and without padding, as text; None if they are correct.

    They may differ from those of the CPU by 2^-8 of their norm, because of bf16 outputs and shorter accumulators.
    """
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((70, 96, 48), (5, 75, 43)):
        x, w = (torch.randn(r, k, generator=generator, dtype=torch.float32).to(KIND) for r in (m, n))
        scales = [torch.rand(r, 1, generator=generator, dtype=torch.float32) + 0.5 for r in (m, n)]
        expected = scaled_product(x, w, *scales)
        y = scaled_product(x.to(device), w.to(device), *(s.to(device) for s in scales)).cpu().float()
        error = float((y - expected).norm() / expected.norm())
        if not error < 2**-8:
            return f"torch._scaled_mm of {m} x {k} x {n}: outputs are off by {error:.1e} of their norm"
    return None


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    # Padded as bytes, since not every operation has a kernel for 8-bit floats. The byte 0 is 0.0.
    return F.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(KIND)

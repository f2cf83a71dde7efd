"""Times one linear layer on the CPU: ditq against the alternatives, interleaved in one run.

``python benchmarks/cpu/linear.py`` prints a table and writes ``benchmarks/results/cpu_linear.json`` and a bar plot.
Times include all operations of a layer: activation quantization, integer product, epilogue, and unpacking for 4 bits.
The default shape is the up projection of a DiT-XL/2 block at 1024 tokens. The error is that of the output against
fp32, ``|y - y_fp32| / |y_fp32|``, on normal inputs and weights.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from _measure import Row, interleaved, relative_error, row, save
from _variants import REGISTRY, Case, Variant, build, nncf_weights, openvino_variant, torch_variant
from torch import Tensor, nn

from ditq.layers import QuantizedLinear
from ditq.numerics import Grid
from ditq.plan import LayerPlan, Rotate

BASELINES = ("torch bf16", "torch fp32", "OpenVINO f32", "NNCF static int8")


class Layer(nn.Module):
    """A linear layer that is called as a transformer is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.linear(x),)


def quantized(linear: nn.Linear, bits: int, rotate: bool, group: int | None = None) -> QuantizedLinear:
    k, n = linear.in_features, linear.out_features
    weight = Grid(
        bits=bits, symmetric=False, granularity="group" if group else "channel", group_size=group
    )  # fmt: skip
    plan = LayerPlan(
        name="linear", role="ffn.up", in_features=k, out_features=n, weight=weight,
        activation=Grid(bits=8, granularity="token", dynamic=True),
        rotate=Rotate(block=128) if rotate else None,
    )  # fmt: skip
    return QuantizedLinear.from_linear(linear, plan)


def ours(case: Case, engine: str, bits: int, rotate: bool = False, group: int | None = None) -> Variant:
    layer = quantized(case.model.linear, bits, rotate, group)  # type: ignore[arg-type]
    if engine == "torch":
        return torch_variant(Layer(layer))
    import openvino as ov
    import openvino.opset13 as op

    from ditq.openvino.convert import linear_spec
    from ditq.openvino.graph import Builder
    from ditq.openvino.settings import compile_config, group_size

    spec = linear_spec("linear", layer)
    x = op.parameter(list(case.call["x"].shape), ov.Type.f32)
    model = ov.Model([op.result(Builder().linear(x.output(0), spec))], [x], "linear")
    return openvino_variant(model, **compile_config(group_size([spec])))


OWN = {
    # By default NNCF leaves the last layer of a model, here the only one, in 8 bits.
    "NNCF weight compression int4": partial(nncf_weights, mode="int4_sym", all_layers=True),
    "ditq W8A8, torch engine": partial(ours, engine="torch", bits=8),
    "ditq W8A8 rotated by H128, torch engine": partial(ours, engine="torch", bits=8, rotate=True),
    "ditq W4A8, torch engine": partial(ours, engine="torch", bits=4),
    "ditq W8A8, OpenVINO": partial(ours, engine="openvino", bits=8),
    "ditq W8A8 rotated by H128, OpenVINO": partial(ours, engine="openvino", bits=8, rotate=True),
    "ditq W4A8, OpenVINO": partial(ours, engine="openvino", bits=4),
    "ditq W4A8 groups of 128, OpenVINO": partial(ours, engine="openvino", bits=4, group=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 1152, 4608), metavar=("M", "K", "N"))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="cpu_linear", help="of the result files")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    m, k, n = args.shape
    calls: list[dict[str, Any]] = [{"x": torch.randn(1, m, k)} for _ in range(5)]
    case = Case(Layer(nn.Linear(k, n)).eval().requires_grad_(False), None, calls[0], calls[1:])
    builders = {name: builder for name, builder in REGISTRY.items() if not name.startswith("ditq")} | OWN
    rows, variants = {}, {}
    reference = case.model(**case.call)[0]
    for name, builder in builders.items():
        variant, status, _ = build(name, case, builder)
        rows[name] = Row(name, status)
        if variant is not None:
            variants[name] = variant
    times = interleaved({v: lambda v=v: variants[v].run(case.call) for v in variants}, args.runs, warmup=3)
    for name, values in times.items():
        error = relative_error(reference, variants[name].run(case.call))
        rows[name] = row(name, values, weights_bytes=variants[name].weights_bytes, relative_error=error)
    fields = {"shape": list(args.shape), "seed": args.seed, "arguments": vars(args)}
    save(args.name, f"One linear layer, M, K, N = {m}, {k}, {n}", list(rows.values()), BASELINES, **fields)


if __name__ == "__main__":
    main()

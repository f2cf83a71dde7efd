"""Times a whole transformer of published size with random weights on the CPU: ditq against the alternatives.

``python benchmarks/cpu/model.py --model dit-xl`` builds every variant from one fp32 model and calls them in turn. It
writes ``benchmarks/results/cpu_model_dit-xl_256.json`` and a bar plot. Times are those of one call of the transformer
at batch 2 (one image with guidance). The error is that of the output against fp32 on the same inputs, ``|y - y_fp32| /
|y_fp32|``.

Recipes of ditq are ``rtn-w8a8`` and ``rtn-w4a8``, which need no calibration, unless a row says otherwise. Static
variants of other libraries, and ViDiT-Q, calibrate on ``--calls`` random calls. Other libraries quantize all linear
layers, ditq those of its plan: in rows without "and modulation" the modulation stays in 16 bit. ``--memory`` also runs
each variant in its own process to measure peak memory during a call (slow).
"""

from __future__ import annotations

import argparse
import json

import torch
from _measure import Row, in_subprocess, interleaved, peak_bytes, relative_error, row, save, trim
from _models import FRAMES, MODELS, make
from _variants import REGISTRY, build

BASELINES = ("torch bf16", "torch fp32", "OpenVINO bf16", "OpenVINO f32", "NNCF static int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="dit-xl")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: that of the model)")
    parser.add_argument("--blocks", type=int, help="default: all of the model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4, help="calls that calibrate static quantization")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="variants whose name contains one of these")
    parser.add_argument("--without", nargs="+", metavar="WORDS", default=[], help="variants to leave out")
    parser.add_argument("--memory", action="store_true", help="peak memory of each variant in its own process")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    side = args.size // 8 if args.size else MODELS[args.model][3]
    blocks = args.blocks or MODELS[args.model][2]
    case = make(args.model, blocks, side, args.batch, args.calls, args.seed)
    if args.peak_of:
        variant, status, _ = build(args.peak_of, case, announce=False)
        call = case.call
        case.__dict__.pop("model")
        case.__dict__.pop("half", None)
        trim()
        peak = None if variant is None else peak_bytes(lambda: variant.run(call))
        print(json.dumps({"peak_bytes": peak, "status": status}))
        return

    names = [
        n for n in REGISTRY
        if (not args.only or any(w in n for w in args.only)) and not any(w in n for w in args.without)
    ]  # fmt: skip
    with torch.no_grad():
        reference = case.model(**case.call, return_dict=False)[0]
    rows, variants = {name: Row(name) for name in names}, {}
    # First what takes the most memory while it is built.
    for name in sorted(names, key=lambda name: (name != "NNCF static int8", not name.startswith("ditq"))):
        variant, rows[name].status, seconds = build(name, case)
        if variant is not None:
            variants[name] = variant
            error = relative_error(reference, variant.run(case.call))
            rows[name] = Row(
                name, weights_bytes=variant.weights_bytes, relative_error=error, seconds_to_build=seconds
            )  # fmt: skip
    cases = {n: lambda v=v: v.run(case.call) for n in names if (v := variants.get(n))}
    print(f"  timing {len(cases)} variants, {args.rounds} rounds", flush=True)
    times = interleaved(cases, args.rounds, warmup=2)  # what lay idle while the others were built is paged in again
    for name, values in times.items():
        known = rows[name]
        rows[name] = row(
            name, values, weights_bytes=known.weights_bytes, relative_error=known.relative_error,
            seconds_to_build=known.seconds_to_build,
        )  # fmt: skip
    pixels = 8 * side
    tokens = (side // 2) ** 2 * (FRAMES if args.model == "latte" else 1)
    title = f"{args.model} {pixels}x{pixels}, {blocks} blocks, batch {args.batch}, {tokens} tokens"
    name = args.name or f"cpu_model_{args.model}_{pixels}"
    fields = {"arguments": vars(args), "blocks_of_the_published_model": MODELS[args.model][2]}
    save(name, title, list(rows.values()), BASELINES, **fields)
    if args.memory:
        variants.clear()
        del case
        trim()
        same = ["--model", args.model, "--blocks", str(blocks), "--size", str(pixels), "--batch", str(args.batch)]
        for known in rows.values():
            if known.status == "ok":
                found = in_subprocess(__file__, [*same, "--calls", str(args.calls), "--peak-of", known.name])
                known.peak_bytes = found["peak_bytes"]
        save(name, title, list(rows.values()), BASELINES, **fields)


if __name__ == "__main__":
    main()

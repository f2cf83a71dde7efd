"""Prints the result files as the Markdown tables that README and docs show: ``python benchmarks/tables.py``."""

from __future__ import annotations

import json
from typing import Any

from environment import RESULTS


def cell(metric: dict[str, Any], digits: int) -> str:
    low, high = metric["ci95"]
    return f"{metric['mean']:.{digits}f} ± {max(high - metric['mean'], metric['mean'] - low):.{digits}f}"


def quality(table: dict[str, Any]) -> list[str]:
    out = [
        "| recipe | PSNR dB | SSIM | latent SQNR dB | average bits | size |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in table["rows"].items():
        values = cell(row["psnr_db"], 1), cell(row["ssim"], 3), cell(row["latent_sqnr_db"], 1)
        out.append(f"| {name} | {' | '.join(values)} | {row['average_bits']:.2f} | {row['size_ratio']:.3f} |")
    return out


def speed(data: dict[str, Any]) -> list[str]:
    """Medians with ratios to every baseline that ran; what did not run is left out here, the JSON says why."""
    rows = [row for row in data["rows"] if row["status"] == "ok"]
    baselines = [name for name in data["baselines"] if name in rows[0]["ratios"]]
    out = [
        f"| | median ms | {' | '.join(f'x {name}' for name in baselines)} | weights MB | error |",
        "| --- |" + " --- |" * (len(baselines) + 3),
    ]
    for row in rows:
        cells = [f"{row['ms_median']:.4g}", *(f"{row['ratios'][name]:.2f}" for name in baselines)]
        cells.append(f"{row['weights_bytes'] / 1e6:.3g}")
        cells.append("" if row["relative_error"] is None else f"{row['relative_error']:.4f}")
        out.append(f"| {row['name']} | {' | '.join(cells)} |")
    return out


def scaling(data: dict[str, Any]) -> list[str]:
    """Milliseconds by shape, a column for each variant."""
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    found: dict[tuple[int, int, float], dict[str, float]] = {}
    for row in data["rows"]:
        found.setdefault((row["tokens"], row["batch"], row["gflop"]), {})[row["name"]] = row["ms_median"]
    out = [f"| tokens | batch | GFLOP | {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) + 2)]
    for (tokens, batch, gflop), values in found.items():
        out.append(f"| {tokens} | {batch} | {gflop:.0f} | {' | '.join(f'{values[name]:.4g}' for name in names)} |")
    return out


def main() -> None:
    data = json.loads((RESULTS / "text_to_image.json").read_text())
    for table in data["tables"]:
        print(f"\n{table['title']}\n")
        print("\n".join(quality(table)))
        for name, d in table["paired_psnr_db"].items():
            print(f"    {name}: {d['mean']:+.2f} [{d['ci95'][0]:+.2f}, {d['ci95'][1]:+.2f}]")
    for path in sorted(RESULTS.glob("cpu_*.json")):
        data = json.loads(path.read_text())
        print(f"\n{data['title']}; {data['cpu']}, {data['threads']} threads\n")
        print("\n".join((scaling if "gflop" in data["rows"][0] else speed)(data)))


if __name__ == "__main__":
    main()

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
    out = ["| layer | median ms | x bf16 | x fp32 |", "| --- | --- | --- | --- |"]
    for row in data["rows"]:
        ratios = f"{row['ratio_to_baseline']:.2f} | {row['ratio_to_fp32']:.2f}"
        out.append(f"| {row['name']} | {row['ms_median']:.1f} | {ratios} |")
    return out


def main() -> None:
    data = json.loads((RESULTS / "text_to_image.json").read_text())
    for table in data["tables"]:
        print(f"\n{table['title']}\n")
        print("\n".join(quality(table)))
        for name, d in table["paired_psnr_db"].items():
            print(f"    {name}: {d['mean']:+.2f} [{d['ci95'][0]:+.2f}, {d['ci95'][1]:+.2f}]")
    data = json.loads((RESULTS / "cpu_linear.json").read_text())
    print(f"\nM, K, N = {data['shape']}; {data['device']}, {data['threads']} threads\n")
    print("\n".join(speed(data)))


if __name__ == "__main__":
    main()

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


def motion(rows: dict[str, Any]) -> list[str]:
    """Closeness of videos to those of 16 bit, and how they move."""
    columns = {
        "PSNR dB": ("psnr_db", 1), "SSIM": ("ssim", 3), "latent SQNR dB": ("latent_sqnr_db", 1),
        "ΔFlow px": ("delta_flow", 3), "warping error": ("warping_error", 4), "smoothness": ("motion_smoothness", 3),
        "concept accuracy": ("concept_accuracy", 3),
    }  # fmt: skip
    out = [f"| recipe | {' | '.join(columns)} | size |", "| --- |" + " --- |" * (len(columns) + 1)]
    own = next(iter(rows.values()))
    references = [own[name].get("reference") for name, _ in columns.values()]
    cells = [cell(r, digits) if r else "" for r, (_, digits) in zip(references, columns.values(), strict=True)]
    out.append(f"| 16 bit | {' | '.join(cells)} | 1 |")
    for name, row in rows.items():
        cells = [cell(row[metric], digits) for metric, digits in columns.values()]
        out.append(f"| {name} | {' | '.join(cells)} | {row['size_ratio']:.3f} |")
    return out


def gaps(found: dict[str, Any], digits: int) -> list[str]:
    """Paired differences of ViDiT-Q to the other methods, a row for each width."""
    table: dict[str, dict[str, str]] = {}
    for pair, d in found.items():
        first, other = pair.split(" - ")
        method, width = other.rsplit("-", 1)
        if first == f"viditq-{width}":
            table.setdefault(width, {})[method] = _gap(d["mean"], d["ci95"], digits)
    methods = list(next(iter(table.values()), {}))
    out = ["| bits | " + " | ".join(f"− {method}" for method in methods) + " |", "| --- |" + " --- |" * len(methods)]
    return out + [f"| {width} | {' | '.join(row[m] for m in methods)} |" for width, row in table.items()]


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


def ladder(rows: dict[str, Any]) -> list[str]:
    """Distances to real pictures and to those of 16 bit, a row for each step of the ladder."""
    columns = {
        "FID": ("fid", 2), "KID x 1000": ("kid", 1), "IS": ("inception_score", 1), "precision": ("precision", 3),
        "PSNR dB": ("psnr_db", 2), "latent SQNR dB": ("latent_sqnr_db", 2),
    }  # fmt: skip

    def cells(entry: dict[str, Any], part: str | None = None) -> str:
        found = []
        for title, (name, digits) in columns.items():
            score = entry[name][part] if part else entry[name]
            factor = 1000 if "1000" in title else 1
            scaled = score and {"mean": score["mean"] * factor, "ci95": [x * factor for x in score["ci95"]]}
            found.append(cell(scaled, digits) if scaled else "")
        return " | ".join(found)

    out = [f"| | {' | '.join(columns)} | size |", "| --- |" + " --- |" * (len(columns) + 1)]
    out.append(f"| 16 bit | {cells(next(iter(rows.values())), 'reference')} | 1 |")
    return out + [f"| {name} | {cells(entry)} | {entry['size_ratio']:.3f} |" for name, entry in rows.items()]


def steps(found: dict[str, Any]) -> list[str]:
    """What each step of the ladder changed, paired by prompt and seed."""
    metrics = {"FID": ("fid", 2), "IS": ("inception_score", 1), "PSNR dB": ("psnr_db", 2)}
    out = [f"| step | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
    for step, values in found.items():
        gaps = [_gap(values[name]["gain"], values[name]["ci95"], digits) for name, digits in metrics.values()]
        out.append(f"| {step} | {' | '.join(gaps)} |")
    return out


def searches(rows: dict[str, Any]) -> list[str]:
    """Searched group sizes against uniform ones, on held-out pictures."""
    out = [
        "| | evaluated | fitness, dB | of the budget | prediction SQNR, dB | to uniform | latent SQNR to uniform |",
        "| --- |" + " --- |" * 6,
    ]
    for name, row in rows.items():
        cells = [f"{row['evaluations']}", f"{row['search_fitness_db']:.2f}"]
        cells += [f"{row['bit_operations'] / row['budget']:.4f}", cell(row["prediction_sqnr_db"], 2)]
        for gap in (row["difference_prediction_sqnr_db"], row["difference_latent_sqnr_db"]):
            cells.append("" if name.startswith("uniform") else _gap(gap["mean"], gap["ci95"], 2))
        out.append(f"| {name} | {' | '.join(cells)} |")
    return out


def _gap(mean: float, ci95: list[float], digits: int) -> str:
    return f"{mean:+.{digits}f} [{ci95[0]:+.{digits}f}, {ci95[1]:+.{digits}f}]"


def roundings(rows: list[dict[str, Any]]) -> list[str]:
    """Errors of single layers by GPTQ and its rivals."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    found = {(row["format"], row["rounding"]): row for row in rows}
    out = [f"| rounding | {' | '.join(f'{x}: seen | held out' for x in formats)} |"]
    out.append("| --- |" + " --- | --- |" * len(formats))
    for way in dict.fromkeys(row["rounding"] for row in rows):
        cells = [f"{found[x, way][rows_]:.4f}" for x in formats for rows_ in ("seen", "held out")]
        out.append(f"| {way} | {' | '.join(cells)} |")
    return out


def models(rows: list[dict[str, Any]]) -> list[str]:
    """SQNR of a whole transformer by recipes."""
    out = ["| | bits | SQNR |", "| --- | --- | --- |"]
    for row in rows:
        out.append(
            f"| {row['recipe']} | {row['bits']} | {row['sqnr_db']:.2f} dB [{row['low']:.2f}, {row['high']:.2f}] |"
        )
    return out


def main() -> None:
    if (path := RESULTS / "class_to_image.json").is_file():
        data = json.loads(path.read_text())
        for width, rows in data["rows"].items():
            print(f"\n{width}, {data['pictures']} pictures a row\n")
            print("\n".join([*ladder(rows), "", *steps(data["steps"][width])]))
    for path in sorted(RESULTS.glob("granularity_search*.json")):
        data = json.loads(path.read_text())
        for recipe, rows in data["rows"].items():
            print(f"\n{path.stem}: {recipe}\n")
            print("\n".join(searches(rows)))
    for name, table in (("layers", roundings), ("model", models)):
        if (path := RESULTS / f"gptq_{name}.json").is_file():
            print(f"\nGPTQ: {name}\n")
            print("\n".join(table(json.loads(path.read_text())["rows"])))
    data = json.loads((RESULTS / "text_to_image.json").read_text())
    for table in data["tables"]:
        print(f"\n{table['title']}\n")
        print("\n".join(quality(table)))
        for name, d in table["paired_psnr_db"].items():
            print(f"    {name}: {d['mean']:+.2f} [{d['ci95'][0]:+.2f}, {d['ci95'][1]:+.2f}]")
    if (path := RESULTS / "text_to_video.json").is_file():
        data = json.loads(path.read_text())
        print(f"\nvideos: {len(data['prompts'])} prompts\n")
        print("\n".join(motion(data["rows"])))
        for metric, digits in (("psnr_db", 2), ("delta_flow", 3)):
            print(f"\nViDiT-Q minus the other, {metric}\n")
            print("\n".join(gaps(data["paired"][metric], digits)))
    for path in sorted(RESULTS.glob("cpu_*.json")):
        data = json.loads(path.read_text())
        print(f"\n{data['title']}; {data['cpu']}, {data['threads']} threads\n")
        print("\n".join((scaling if "gflop" in data["rows"][0] else speed)(data)))


if __name__ == "__main__":
    main()

"""Train one recipe with several methods and seeds, and tabulate the scores as mean ± std over seeds.

    python benchmarks/recipe_table.py sentences6 --methods lora alora --seeds 0 1 2

Finished runs under --runs are reused and stopped ones resumed, so a long table may be filled over several sittings.
Writes `benchmarks/results/RECIPE.json`: scores per method, seed and task, seconds, parameters, machine, versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from braidlora.config import load_config
from braidlora.runs import environment
from braidlora.training.run import train

RESULTS = Path(__file__).parent / "results"


def run(recipe: str, method: str, seed: int, runs: Path, overrides: list[str]) -> dict[str, Any]:
    output = runs / recipe / f"{method}-seed{seed}"
    settings = [*overrides, f"adapter.method={method}", f"seed={seed}", f"output={output}"]
    metrics = train(load_config(recipe, settings), resume="auto").metrics
    return {"method": method, "seed": seed, **metrics}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one row per method, one column per task and for the mean; mean ± sample std over seeds."""
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    tasks = list(cells[0]["tasks"])
    lines = [
        "| method | seeds | parameters | " + " | ".join([*tasks, "mean", "worst"]) + " | seconds |",
        "|" + "---|" * (len(tasks) + 6),
    ]
    for method in methods:
        rows = [cell for cell in cells if cell["method"] == method]
        columns = [[row["tasks"][task]["score"] for row in rows] for task in tasks]
        columns += [[row["mean"] for row in rows], [row["worst"] for row in rows]]
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(
            f"| {method} | {len(rows)} | {rows[0]['trainable_parameters']:,} | "
            + " | ".join(map(mean_and_std, columns))
            + f" | {seconds:.0f} |"
        )
    return "\n".join(lines)


def mean_and_std(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="+", default=["lora", "alora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe"
    )
    parser.add_argument("--only-table", action="store_true", help="tabulate the finished runs; train nothing")
    args = parser.parse_args()
    cells = []
    for seed in args.seeds:
        for method in args.methods:
            finished = args.runs / args.recipe / f"{method}-seed{seed}" / "metrics.json"
            if args.only_table:
                cells.append({"method": method, "seed": seed, **json.loads(finished.read_text())})
            else:
                cells.append(run(args.recipe, method, seed, args.runs, args.set))
    result = {"recipe": args.recipe, "overrides": args.set, "environment": environment(), "cells": cells}
    target = RESULTS / f"{args.recipe.replace('/', '-')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()

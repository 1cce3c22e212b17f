"""Run one cell of a published table again and say whether its score lies within the table's interval.

    python scripts/check_cell.py benchmarks/results/sentences6.json                     # the cheapest row, first seed
    python scripts/check_cell.py RESULT --row alora --seed 2
    python scripts/check_cell.py RESULT --row fed-alora --seed 0 --model.path=FOLDER    # further words are overrides

RESULT is the JSON of a comparison (`comparison.json` of `braidlora compare`, or what its `--submit` wrote), of
benchmarks/evidence.py, or of benchmarks/rules_side_by_side.py. Further words override the recipe where your machine
keeps the base elsewhere. The interval is Student's t prediction interval for one more seed, at the table's confidence:
mean ± t·s·√(1 + 1/n) over its n seeds. On the machine and versions of the table the score is the same to the digit;
elsewhere rounding differs.

Where RESULT has fingerprints of the cell's rows, `same_data` says whether the rerun's were the same, and `other_data`
names the tasks whose rows differ. (A recipe with `limit` draws other rows for every seed; the fingerprints are those of
the first.)

Prints JSON and exits with 0 if the score lies within the interval on the same rows, 1 if not, 2 if RESULT has no such
cell.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braidlora
from braidlora.comparison.statistics import t_quantile
from braidlora.config import FederatedConfig, RunConfig, load_config, override_config, schema_of
from braidlora.errors import BraidloraError


@dataclass(frozen=True)
class Published:
    """One cell of a table: how to run it, and what the table says of its row."""

    config: RunConfig | FederatedConfig
    scores: Mapping[str, Any]  # {"mean", "std_seeds", "values"} of the mean over tasks or clients
    at: int  # the seed's place in `values`
    data: Mapping[str, Any] | None = (
        None  # fingerprints of the rows by task and part, where the table has them
    )


def find(result: Mapping[str, Any], row: str | None, seed: int | None, given: list[str]) -> Published:
    """The cell; without a name the row with the fewest seconds.

    Raises:
        KeyError: there is no such row or seed; the message names those there are.
    """
    if result.get("kind") == "evidence":
        result = result["comparison"]
    if result.get("kind") == "federations":
        rows = {
            name: (entry, [*result["options"], *group["options"], *entry["options"]])
            for group in result["groups"].values()
            for name, entry in group["rows"].items()
        }
        name, (entry, options) = _pick(rows, row)
        at, chosen = _seed(entry.get("seeds", result["seeds"]), seed)
        words = [*options, f"--seed={chosen}", *given]
        config = load_config(result["recipe"], words, schema_of(result["recipe"]))
        return Published(config, entry["mean"], at)
    if "rows" not in result or "recipe" not in result:
        raise KeyError("this is not the JSON of a comparison, of evidence.py or of rules_side_by_side.py")
    name, (entry, overrides) = _pick({one["name"]: (one, one["overrides"]) for one in result["rows"]}, row)
    if any(key == "peft_type" for key in overrides):
        raise KeyError(f"row {name!r} is a PEFT configuration; run it with `braidlora compare --row`")
    at, chosen = _seed(entry["seeds"], seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(result["recipe"]["yaml"], encoding="utf-8")
        config = load_config(recipe, given)
    changes = {**overrides, **(entry["tuned"] or {}), "seed": chosen}
    named = {word.lstrip("-").partition("=")[0] for word in given}
    kept = {key: value for key, value in changes.items() if key not in named}
    data = result.get("data") if at == 0 or not _draws_rows(config) else None
    return Published(override_config(config, kept), entry["mean"], at, data)


def _draws_rows(config: RunConfig) -> bool:
    """Whether the seed decides which rows a run has."""
    sources = [getattr(task, part) for task in config.tasks for part in ("train", "validation", "test")]
    return any(source is not None and source.limit for source in sources)


def _pick(rows: Mapping[str, Any], name: str | None) -> tuple[str, Any]:
    if name is None:
        name = min(rows, key=lambda one: rows[one][0]["seconds"]["mean"])
    if name not in rows:
        raise KeyError(f"no row {name!r}; the rows are {', '.join(rows)}")
    return name, rows[name]


def _seed(seeds: list[int], seed: int | None) -> tuple[int, int]:
    if seed is None:
        seed = seeds[0]
    if seed not in seeds:
        raise KeyError(f"no seed {seed}; the seeds are {', '.join(map(str, seeds))}")
    return seeds.index(seed), seed


def rerun(cell: Published, output: Path) -> tuple[float, list[str] | None]:
    """Its mean score, from a new run in `output`, and the tasks whose rows are not the table's; None if unknown."""
    config = override_config(cell.config, {"output": str(output)})
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the verdict alone
        if isinstance(config, FederatedConfig):
            braidlora.federate(config)
        else:
            braidlora.train(config)
    score = float(json.loads((output / "metrics.json").read_text(encoding="utf-8"))["mean"])
    if cell.data is None:
        return score, None
    data = json.loads((output / "data.json").read_text(encoding="utf-8"))["tasks"]
    return score, [task for task, parts in cell.data.items() if _prints(parts) != _prints(data.get(task, {}))]


def _prints(parts: Mapping[str, Any]) -> dict[str, str]:
    return {part: about["sha256"] for part, about in parts.items()}


def compare(
    score: float, cell: Published, confidence: float, other_data: list[str] | None = None
) -> dict[str, Any]:
    """What the table says, what the rerun gave, and whether they agree.

    With one seed, or seeds that all score the same, there is no interval but the published value.
    """
    values = cell.scores["values"]
    spread = cell.scores["std_seeds"] or 0.0
    count, mean = len(values), cell.scores["mean"]
    reach = t_quantile(confidence, count - 1) * spread * (1 + 1 / count) ** 0.5 if count > 1 else 0.0
    low, high = mean - reach, mean + reach
    published = values[cell.at]
    return {
        "score": score,
        "published": published,
        "same": abs(score - published) < 1e-9,
        "interval": [low, high],
        "confidence": confidence,
        "within": low - 1e-9 <= score <= high + 1e-9,
        "same_data": None if other_data is None else not other_data,
        "other_data": other_data or [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("--row", help="default: the row with the fewest seconds per run")
    parser.add_argument("--seed", type=int, help="default: the first")
    parser.add_argument("--output", type=Path, help="keep the run here; by default it is removed")
    arguments, given = parser.parse_known_args()
    try:
        result = json.loads(arguments.result.read_text(encoding="utf-8"))
        cell = find(result, arguments.row, arguments.seed, given)
    except (OSError, ValueError, KeyError) as error:
        print(
            f"{arguments.result}: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr
        )
        return 2
    comparison = result["comparison"] if result.get("kind") == "evidence" else result
    try:
        with tempfile.TemporaryDirectory() as folder:
            score, other_data = rerun(cell, arguments.output or Path(folder) / "run")
    except BraidloraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    verdict = compare(score, cell, comparison.get("confidence", 0.95), other_data)
    print(json.dumps(verdict, indent=1))
    return 0 if verdict["within"] and not other_data else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Does a short probe predict which sharing scheme is best? Outcomes, probes, and rules on suites they have not seen.

    python benchmarks/advise.py outcomes    # comparisons of small generated suites: half an hour on one core, resumes
    python benchmarks/advise.py probes      # `braidlora advise` on every suite with an outcome; --again to repeat them
    python benchmarks/advise.py             # calibrate on both: benchmarks/results/advise.json and the package's copy

A suite is a comparison under benchmarks/results: its rows say which method was best, its recipe is probed. A rule (one
measurement, one threshold, two methods) is fitted on the other suites and picks a method for this one: once with all
others, once without those of its family, which share tasks or base with it. A pick is good if it is the best method of
the table, or if the paired 95% CI over seeds of what it is behind the best one contains 0.

The package's copy has a rule only if, on other families, its picks are better than those of the one method that was
best elsewhere: more suites with a better than with a worse pick, at 5% over all measurements (sign test, Bonferroni).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scipy.stats

import data_folder  # noqa: F401
from braidlora.advisor import advise
from braidlora.advisor.calibration import FILE, Rule, Suite, fit, fit_always
from braidlora.advisor.cost import METHODS
from braidlora.advisor.pairs import MEASURES
from braidlora.comparison import compare
from braidlora.comparison.statistics import t_quantile
from braidlora.config import RunConfig, load_config, override_config
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "advise.json"
RUNS = Path("runs/advise")
SEEDS = (0, 1, 2, 3, 4)
# Tasks of the demo, from closely related to unrelated.
GENERATED = {
    "opposites": ("rising", "falling"),
    "orders": ("rising", "falling", "backwards"),
    "kinds": ("count", "odd_one_out", "who"),
    "numbers": ("rising", "count", "sum"),
    "words": ("odd_one_out", "who", "mood"),
    "unlike": ("backwards", "mood", "sum"),
    "mixed": ("falling", "who", "sum"),
}
# By results file: suites of one family share tasks or base.
FAMILIES = {
    "suite": "generated",
    **{f"generated-{name}": "generated" for name in GENERATED},
    "sentences6": "sentences",
    "sentences6-small": "sentences",
    "sentences-unequal": "sentences",
    "induction": "induction",
    "flan8-smollm2": "flan8",
}
_FAMILY_LEVEL = 0.05


def outcomes() -> None:
    """A comparison of all methods for each small suite; finished runs are kept."""
    for name, tasks in GENERATED.items():
        recipe = override_config(
            load_config("demo", []),
            {
                "tasks": [{"name": task, "train": f"generated:{task}"} for task in tasks],
                "training.threads": 1,
                "output": str(RUNS / name),
            },
        )
        result = compare(
            recipe, name=name, methods=METHODS, seeds=SEEDS, references="none", workers=1, report=False,
            command="python benchmarks/advise.py outcomes",
        )  # fmt: skip
        _write(RESULTS / f"generated-{name}.json", result)


def tables() -> dict[str, dict[str, Any]]:
    """The comparisons that exist, by results file."""
    found = {}
    for name in FAMILIES:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            found[name] = result["comparison"] if result.get("kind") == "evidence" else result
    return found


def recipe_of(table: dict[str, Any]) -> RunConfig:
    """The recipe of a table, as it was when the table was made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(table["recipe"]["yaml"], encoding="utf-8")
        return load_config(path, [])


def probes(again: bool) -> None:
    """`advise` on every suite with an outcome; a probe that is done, or whose measurements are committed, is kept."""
    for name, table in tables().items():
        if again or probe_of(name) is None:
            output = RUNS / f"{name}-probe"
            advise(recipe_of(table), output, name=name, command="python benchmarks/advise.py probes")


def probe_of(name: str) -> dict[str, Any] | None:
    """What a suite's probe measured: from runs/, or else from the committed result; None if it was not probed."""
    path = RUNS / f"{name}-probe" / "advice.json"
    if path.is_file():
        probe = json.loads(path.read_text(encoding="utf-8"))
        cost = {key: probe["cost"][key] for key in ("rows", "seconds", "share_of_rows", "share_of_seconds")}
        return {
            "tasks": len(probe["tasks"]), "measures": probe["measures"], "against": _against(probe), "cost": cost,
        }  # fmt: skip
    if not RESULT.is_file():
        return None
    committed = {suite["name"]: suite for suite in json.loads(RESULT.read_text(encoding="utf-8"))["suites"]}
    if name not in committed:
        return None
    return {key: committed[name][key] for key in ("tasks", "measures", "against", "cost")}


def calibrate() -> dict[str, Any]:
    """Rules fitted without a suite, and what they pick for it."""
    suites, about = [], []
    for name, table in tables().items():
        probe = probe_of(name)
        if probe is None:
            print(f"{name}: no probe; run python benchmarks/advise.py probes")
            continue
        suite = suite_of(name, table, probe["measures"])
        suites.append(suite)
        about.append(
            {
                "name": name, "family": suite.family, "seeds": len(table["seeds"]), **probe, "points": suite.points,
                "best": min(suite.points, key=suite.points.__getitem__), "good": suite.good,
            }
        )  # fmt: skip
    return {
        "kind": "advise", "command": "python benchmarks/advise.py", "suites": about, **judge_rules(suites),
        "environment": environment(),
    }  # fmt: skip


def judge_rules(suites: Sequence[Suite]) -> dict[str, Any]:
    """What rules pick for suites and families that they were not fitted on, and the rule that predicts, if one does."""
    result: dict[str, Any] = {}
    for left_out, others in (("suite", _not_itself), ("family", _not_its_family)):
        judged = [suite for suite in suites if others(suite, suites)]
        result[left_out] = {
            "of": [suite.name for suite in judged],
            "random": statistics.fmean(len(suite.good) / len(suite.points) for suite in judged),
            "always": _judge(judged, [fit_always(others(s, suites), _methods(s)) for s in judged]),
            "measures": {
                measure: _judge(judged, [fit(others(s, suites), measure, _methods(s)) for s in judged])
                for measure in MEASURES
            },
        }
        for one in result[left_out]["measures"].values():
            one["p"] = sign_test(one["behind"], result[left_out]["always"]["behind"])
    result["methods"] = {method: _record(suites, method) for method in METHODS}
    result["correlations"] = {measure: _correlation(suites, measure) for measure in MEASURES}
    result["rule"] = _rule(result, suites)
    return result


def suite_of(name: str, table: dict[str, Any], measures: dict[str, Any]) -> Suite:
    """Points behind the best of the methods that `advise` may pick, and which of them are not significantly worse."""
    rows = {row["name"]: row["mean"] for row in table["rows"] if row["name"] in METHODS}
    best = max(rows, key=lambda method: rows[method]["mean"])
    points = {method: rows[best]["mean"] - row["mean"] for method, row in rows.items()}
    good = [method for method, row in rows.items() if not _worse(row["values"], rows[best]["values"])]
    return Suite(name, FAMILIES[name], measures, points, good)


def _worse(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the paired interval of what it is behind the best excludes 0."""
    behind = [other - value for value, other in zip(values, best, strict=True)]
    if len(behind) < 2 or not any(behind):
        return False
    reach = t_quantile(0.95, len(behind) - 1) * statistics.stdev(behind) / math.sqrt(len(behind))
    return statistics.fmean(behind) - reach > 0.0


def _methods(suite: Suite) -> list[str]:
    """What a rule may pick for a suite: what its table has."""
    return list(suite.points)


def _not_itself(suite: Suite, suites: Sequence[Suite]) -> list[Suite]:
    return [other for other in suites if other is not suite]


def _not_its_family(suite: Suite, suites: Sequence[Suite]) -> list[Suite]:
    return [other for other in suites if other.family != suite.family]


def _judge(suites: Sequence[Suite], rules: Sequence[Rule]) -> dict[str, Any]:
    picks = [rule.pick(suite.measures) for suite, rule in zip(suites, rules, strict=True)]
    behind = [suite.points[pick] for suite, pick in zip(suites, picks, strict=True)]
    return {
        "good": sum(pick in suite.good for suite, pick in zip(suites, picks, strict=True)),
        "picks": picks, "behind": behind, "points": statistics.fmean(behind) if behind else None,
    }  # fmt: skip


def sign_test(behind: Sequence[float], other: Sequence[float]) -> float:
    """One-sided p: as many suites or more where `behind` is less than `other`, if either were as likely."""
    better = sum(a < b for a, b in zip(behind, other, strict=True))
    decided = better + sum(a > b for a, b in zip(behind, other, strict=True))
    return sum(math.comb(decided, k) for k in range(better, decided + 1)) / 2**decided


def _record(suites: Sequence[Suite], method: str) -> dict[str, Any]:
    """How often one method was not significantly worse than the best, and its mean points behind, where it was run."""
    having = [suite for suite in suites if method in suite.points]
    behind = [suite.points[method] for suite in having]
    return {
        "good": sum(method in suite.good for suite in having), "of": len(having),
        "points": statistics.fmean(behind) if behind else None,
    }  # fmt: skip


def _correlation(suites: Sequence[Suite], measure: str) -> dict[str, Any]:
    """Spearman's rank correlation of a measurement with what LoRA is behind the best method, and its p."""
    known = [(value, s.points["lora"]) for s in suites if (value := s.measures[measure]) is not None]
    if len({value for value, _ in known}) < 2:
        return {"rho": None, "p": None, "suites": len(known)}
    found = scipy.stats.spearmanr(*zip(*known, strict=True))
    return {"rho": float(found.statistic), "p": float(found.pvalue), "suites": len(known)}


def _rule(result: dict[str, Any], suites: Sequence[Suite]) -> dict[str, Any] | None:
    measures = result["family"]["measures"]
    best = min(measures, key=lambda measure: measures[measure]["p"])
    if measures[best]["p"] > _FAMILY_LEVEL / len(MEASURES):
        return None
    return fit(suites, best, METHODS).__dict__


def _against(probe: dict[str, Any]) -> list[list[str]]:
    return [pair["tasks"] for pair in probe["pairs"] if "against" in (pair["A"]["pull"], pair["B"]["pull"])]


def package_copy(result: dict[str, Any]) -> dict[str, Any]:
    """What `advise` reads: the rule, and how often picks were good on other families."""
    unseen = result["family"]
    best = max(unseen["measures"], key=lambda measure: unseen["measures"][measure]["good"])
    of, always = len(unseen["of"]), unseen["always"]
    return {
        "suites": len(result["suites"]),
        "families": len({suite["family"] for suite in result["suites"]}),
        "rule": result["rule"],
        "best_measure": {"measure": best, "good": unseen["measures"][best]["good"], "of": of},
        "always": {"method": statistics.mode(always["picks"]), "good": always["good"], "of": of},
        "lora": {key: result["methods"]["lora"][key] for key in ("good", "of")},
        "random": unseen["random"],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=("outcomes", "probes", "calibrate"), default="calibrate")
    parser.add_argument("--again", action="store_true", help="repeat probes that are done")
    arguments = parser.parse_args()
    if arguments.stage == "outcomes":
        outcomes()
    elif arguments.stage == "probes":
        probes(arguments.again)
    else:
        result = calibrate()
        _write(RESULT, result)
        _write(FILE, package_copy(result))


if __name__ == "__main__":
    main()

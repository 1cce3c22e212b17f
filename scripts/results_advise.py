"""The tables of benchmarks/results/advise.json: what the probe measured on suites, and what rules picked for them."""

from __future__ import annotations

from typing import Any

from braidlora.advisor.advice import label
from braidlora.advisor.pairs import MEASURES

_SHOWN = ("gradients_A", "gradients_B", "against", "updates", "columns", "inputs")
_SHORT = {
    "gradients_A": "gradients, A", "gradients_B": "gradients, B", "against": "pairs against", "updates": "ΔW",
    "columns": "B above chance", "inputs": "A x",
}  # fmt: skip


def advise(result: dict[str, Any]) -> str:
    """Suites with measurements and outcome, rules on suites and families that they have not seen, and the answer."""
    return "\n\n".join([_suites(result), _rules(result), _answer(result)])


def _suites(result: dict[str, Any]) -> str:
    rows = []
    for suite in result["suites"]:
        methods = ", ".join(label(method) for method in suite["good"])
        all_good = len(suite["good"]) == len(suite["points"])
        rows.append(
            [suite["name"], *(_number(suite["measures"][name]) for name in _SHOWN), label(suite["best"]),
             "all" if all_good else methods, f"{suite['points']['lora']:.1f}", f"{suite['cost']['share_of_rows']:.1%}"]
        )  # fmt: skip
    header = ["suite", *_SHORT.values(), "best", "not significantly worse", "LoRA is behind by", "cost"]
    return _table(header, rows)


def _rules(result: dict[str, Any]) -> str:
    suite, family = result["suite"], result["family"]
    rows = []
    for name, text in MEASURES.items():
        one, other, found = suite["measures"][name], family["measures"][name], result["correlations"][name]
        rows.append(
            [text, *_picks(one, suite), *_picks(other, family), f"{other['p']:.2f}",
             f"{_number(found['rho'])} ({_number(found['p'])})"]
        )  # fmt: skip
    for title, of_suite, of_family in (
        ("no measurement: the method that was best elsewhere", suite["always"], family["always"]),
    ):
        rows.append([title, *_picks(of_suite, suite), *_picks(of_family, family), "", ""])
    for method, one in result["methods"].items():
        points = "–" if one["points"] is None else f"{one['points']:.1f}"
        rows.append([f"always {label(method)}", f"{one['good']} of {one['of']}", points, "", "", "", ""])
    rows.append(
        ["any method, at random", f"{suite['random']:.0%}", "", f"{family['random']:.0%}", "", "", ""]
    )
    header = ["pick by", "good, unseen suite", "points behind", "good, unseen family", "points behind", "p",
              "correlation with what LoRA is behind (p)"]  # fmt: skip
    return _table(header, rows)


def _picks(one: dict[str, Any], left_out: dict[str, Any]) -> list[str]:
    points = "–" if one["points"] is None else f"{one['points']:.1f}"
    return [f"{one['good']} of {len(left_out['of'])}", points]


def _answer(result: dict[str, Any]) -> str:
    rule = result["rule"]
    here = result["environment"]
    if rule is None:
        words = (
            "No measurement predicts: none is better than the one method that was best elsewhere, so `advise` gives no "
            "advice."
        )
    else:
        words = (
            f"`advise` uses {MEASURES[rule['measure']]}: below {rule['threshold']:.2f} {label(rule['below'])}, "
            f"otherwise {label(rule['above'])}."
        )
    return f"{words}\n\n`{result['command']}`, {here['date'][:10]}, {here['machine']['processor']}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

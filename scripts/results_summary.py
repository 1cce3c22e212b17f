"""The first screen of docs/results.md: what its tables say together, from the same files under benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_RESULTS = re.compile(r"<!-- results: (\S+) -->")


def summary(page: str, results: Path) -> str:
    """Sharing schemes, federated rules, and costs, one line per table of the page.

    Args:
        page: the text of the page, for the sections to link to.
        results: the folder with the JSON files.
    """
    anchors = _anchors(page)
    found = {name: _read(results / f"{name}.json") for name in anchors}
    parts = [
        "**Does a sharing scheme beat a plain LoRA?** ALoRA compared with LoRA on the same tasks and seeds, in points "
        "of the mean score; a difference is significant if its 95% CI excludes 0.",
        _schemes(found, anchors),
        "**Does a federation beat training alone?** Mean score over clients. If the clients' labels or tasks differ, "
        "training alone is hard to beat; if all clients have the same kind of data, averaging helps.",
        _federations(found, anchors),
        "**What does it cost?**",
        "\n".join(f"- {line}" for line in _costs(found, anchors)),
    ]
    return "\n\n".join(parts)


def _read(path: Path) -> dict[str, Any]:
    """A results file; of a tuned table its comparison."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") != "evidence":
        return content
    return dict(content["comparison"])


def _anchors(page: str) -> dict[str, tuple[str, str]]:
    """Heading and anchor of the section that has each results file, as the site names them."""
    found: dict[str, tuple[str, str]] = {}
    heading, taken = "", {}
    for line in page.split("\n"):
        if line.startswith("#"):
            heading = line.lstrip("# ")
            slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
            number = taken.get(slug, 0)
            taken[slug] = number + 1
            anchor = f"{slug}_{number}" if number else slug
        elif (match := _RESULTS.match(line)) and match[1] != "summary":
            found[match[1]] = (heading, anchor)
    return found


def _schemes(found: dict[str, Any], anchors: dict[str, tuple[str, str]]) -> str:
    rows = []
    for name, result in found.items():
        listed = result.get("rows") if "verdict" in result else None
        by_name = {row["name"]: row for row in listed} if listed else {}
        ours, lora = by_name.get("alora"), by_name.get("lora")
        if not ours or not lora or not ours["difference"]:
            continue
        difference = ours["difference"]
        significant = difference.get("judged", True) and not difference["low"] <= 0 <= difference["high"]
        verdict = ("better" if difference["mean"] > 0 else "worse") if significant else "not significant"
        ratio = ours["trainable_parameters"] / lora["trainable_parameters"]
        rows.append([
            _link(anchors[name]), f"{len(result['tasks'])} × {len(result['seeds'])}", f"{lora['mean']['mean']:.1f}",
            _interval(difference), verdict, f"{ratio:.1f} ×",
        ])  # fmt: skip
    return _table(["measured on", "tasks × seeds", "LoRA", "ALoRA − LoRA", "difference", "parameters"], rows)


def _federations(found: dict[str, Any], anchors: dict[str, tuple[str, str]]) -> str:
    rules = ("local", "fedit", "fedsa-lora", "fed-alora")
    rows = []
    for name, result in found.items():
        if result.get("kind") != "federations" or not result["scored"]:
            continue
        for title, group in result["groups"].items():
            if all(rule in group["rows"] for rule in rules):
                scores = [f"{group['rows'][rule]['mean']['mean']:.1f}" for rule in rules]
                rows.append([_link(anchors[name]) + (f", {title}" if title else ""), *scores])
    return _table(["measured on", "alone (`local`)", *(f"`{rule}`" for rule in rules[1:])], rows)


def _costs(found: dict[str, Any], anchors: dict[str, tuple[str, str]]) -> list[str]:
    lines = []
    for name, result in found.items():
        link = _link(anchors[name])
        if name.startswith("decode"):
            ratios = [
                row["ratio_to_peft_lora"]["alora"] for row in result["rows"] if row["benchmark"] == "decode"
            ]
            lines.append(
                f"A step of cached decoding with ALoRA on a CPU: {min(ratios):.2f} to {max(ratios):.2f} times the "
                f"time of PEFT's LoRA ({link})."
            )
        elif "goals" in result:
            ratios = [r["ratio_to_peft_lora"]["alora"] for r in result["rows"] if r["benchmark"] == "layer"]
            lines.append(
                f"An ALoRA layer on a CPU, forward and backward: {min(ratios):.2f} to {max(ratios):.2f} times the "
                f"time of PEFT's LoRA ({link})."
            )
        elif result.get("kind") == "export_cost":
            tasks = result["tasks"].values()
            means = [sum(task[key] for task in tasks) / len(tasks) for key in ("router", "own")]
            lines.append(
                f"Export with fixed expert weights: mean score {means[0]:.1f} with the router, {means[1]:.1f} after "
                f"the export ({link})."
            )
        elif result.get("kind") == "coverage":
            covered = [row["coverage"] for row in result["rows"]]
            lines.append(
                f"The 95% CIs contain the true difference in {min(covered):.0%} to {max(covered):.0%} of simulated "
                f"comparisons ({link})."
            )
    return lines


def _link(section: tuple[str, str]) -> str:
    return f"[{section[0]}](#{section[1]})"


def _interval(value: dict[str, Any]) -> str:
    return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]".replace("-", "−")


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])

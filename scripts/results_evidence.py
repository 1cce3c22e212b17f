"""The tables of a results file of benchmarks/evidence.py besides its comparison: tuning, and single-task LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.tables import markdown_table

RATE = "training.learning_rate"


def evidence(result: Mapping[str, Any]) -> str:
    """Validation loss by learning rate, and the scores that Δm% is measured against."""
    parts = ["#### Learning rates tried", tuning(result["tuning"], result["comparison"]["rows"])]
    parts += [left_out(task, found) for task, found in result["unlearned"].items()]
    if result["single"]:
        parts += ["#### LoRAs for one task", single(result["single"], result["comparison"]["seeds"])]
    parts.append(made_on(result["machines"]))
    return "\n\n".join(parts)


def tuning(tuned: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The validation loss of every rate, a row's lowest in bold; and the rates of rows that were not tuned."""
    rates = sorted({point["values"][RATE] for row in tuned for point in row["tuning"]})
    lines = []
    for row in tuned:
        losses = {point["values"][RATE]: point["validation_loss"] for point in row["tuning"]}
        means = {rate: loss["mean"] for rate, loss in losses.items() if loss is not None}
        lowest = min(means, key=means.__getitem__)
        cells = [
            "–" if rate not in means else f"**{means[rate]:.3f}**" if rate == lowest else f"{means[rate]:.3f}"
            for rate in rates
        ]
        lines.append([f"`{row['name']}`", *cells])
    seen = {row["name"] for row in tuned}
    fixed = [f"`{row['name']}` {row['overrides'][RATE]:g}" for row in rows if row["name"] not in seen]
    text = markdown_table(["validation loss at learning rate", *(f"{rate:g}" for rate in rates)], lines)
    return f"{text}\n\nNot tuned here: {', '.join(fixed)}." if fixed else text


def left_out(task: str, found: Mapping[str, Any]) -> str:
    """Why a task that was tuned on is not in the table."""
    scores = found["rows"].values()
    return (
        f"`{task}` was among the tasks while rates were tuned. On its test rows the tuned runs scored "
        f"{min(scores):.1f} to {max(scores):.1f} and the most frequent answer {found['majority']:.1f}, so the table "
        "leaves it out."
    )


def made_on(machines: Mapping[str, Mapping[str, int]]) -> str:
    """The machines of each stage's runs."""
    parts = [
        f"{stage} {', '.join(f'{name} ({count})' for name, count in sorted(found.items()))}"
        for stage, found in machines.items()
        if found
    ]
    return f"Machines (runs): {'; '.join(parts)}."


def single(scores: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """Mean score and standard deviation of a LoRA for each task alone."""
    cells = []
    for found in scores.values():
        spread = "" if found["std_seeds"] is None else f" ± {found['std_seeds']:.1f}"
        cells.append(f"{found['mean']:.1f}{spread}")
    mean = sum(found["mean"] for found in scores.values()) / len(scores)
    text = markdown_table([*scores, "mean"], [[*cells, f"{mean:.1f}"]])
    return f"{text}\n\nA LoRA for one task, at its best epoch on validation rows; {len(seeds)} seeds."

"""A probe as plain text: what it costs before it starts, and afterwards its measurements, pairs and advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from braidlora.tables import UNKNOWN, listed, number, plural, text_table

if TYPE_CHECKING:
    from braidlora.advisor.cost import ProbePlan

_PAIRS = 8  # with the lowest cosine that are shown
_two = partial(number, digits=2)


def format_plan(name: str, tasks: Sequence[str], plan: ProbePlan) -> str:
    """The cost of a probe before it starts."""
    return (
        f"Probe of {name}: {plural(len(tasks), 'task')}, {plan.steps} steps of {plural(plan.batch_size, 'row')} each, "
        f"and gradients of {plural(plan.gradient_rows, 'row')} each.\n"
        f"Cost: {plan.rows:,} training rows, {plan.share:.1%} of a comparison's {plan.comparison_rows:,}."
    )


def format_advice(result: Mapping[str, Any]) -> str:
    """The tables and sentences of `advice.json`."""
    cost, advice = result["cost"], result["advice"]
    return "\n\n".join(
        [
            f"The probe cost {cost['rows']:,} training rows, {cost['share_of_rows']:.1%} of a comparison's, and took "
            f"{_seconds(cost['seconds'])}; at its speed, the comparison's training takes "
            f"{_seconds(cost['comparison']['seconds'])}.",
            _measures(result),
            _pairs(result["pairs"]),
            "\n".join(advice[key] for key in ("conflicts", "what", "sure")),
            f"Next: {advice['next']}",
        ]
    )


def _measures(result: Mapping[str, Any]) -> str:
    factors, matrices, pairs = result["gradients"]["factors"], result["matrices"], result["pairs"]
    rows = []
    for factor in ("A", "B"):
        found = factors[factor]
        rows.append(
            _line(
                f"cosine of gradients on {factor}",
                pairs,
                partial(_cosine_on, factor),
                within=_two(found["within"]),
            )
        )
    inputs = [row[at] for at, row in enumerate(matrices["inputs"])]
    within = "" if None in inputs else _two(sum(inputs) / len(inputs))
    rows.append(_line("cosine of ΔW", pairs, itemgetter("updates")))
    rows.append(
        _line("similarity of B", pairs, itemgetter("columns"), chance=_two(matrices["columns_chance"]))
    )
    rows.append(_line("likeness of A x", pairs, itemgetter("inputs"), within=within))
    header = ["", "between tasks", "within a task", "by chance", "lowest", "of"]
    return text_table(header, rows, left=(0, 5))


def _cosine_on(factor: str, pair: Mapping[str, Any]) -> float | None:
    found: float | None = pair[factor]["cosine"]
    return found


def _line(
    title: str,
    pairs: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
    within: str = "",
    chance: str = "",
) -> list[str]:
    """Mean over the pairs, what to compare it with, and the lowest pair."""
    known = [(found, pair) for pair in pairs if (found := value(pair)) is not None]
    if not known:
        return [title, UNKNOWN, within, chance, UNKNOWN, ""]
    lowest, pair = min(known, key=itemgetter(0))
    mean = sum(found for found, _ in known) / len(known)
    return [title, _two(mean), within, chance, _two(lowest), listed(pair["tasks"])]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            listed(pair["tasks"]),
            *(f"{_two(pair[f]['cosine'], sign=True)} {pair[f]['pull']}" for f in ("A", "B")),
            *(_two(pair[name]) for name in ("updates", "columns", "inputs")),
        ]
        for pair in pairs[:_PAIRS]
    ]
    header = ["pair", "gradients on A", "gradients on B", "ΔW", "B", "A x"]
    more = f"\n… {len(pairs) - _PAIRS} more pairs in the JSON" if len(pairs) > _PAIRS else ""
    return text_table(header, rows) + more


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

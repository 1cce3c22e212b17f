"""What a comparison advises: which method to use, with what confidence, what to do next, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.reporting.findings import (
    Learned,
    data_findings,
    learn_more,
    learned,
    task_list,
    tasks_by_learned,
    too_few_rows,
    undecided,
)
from braidlora.reporting.significance import mark
from braidlora.tables import listed, number, plural, spread

Row = Mapping[str, Any]


def advise(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The advice of a comparison.

    Returns:
        `{"choice", "run", "undecided", "what", "sure", "next", "findings"}`: the name of the row to take and the path
        of its run to ship, both None if there is none; whether there are too few test rows to say that anything was
        learned; three sentences; and findings of one line each, the most important first.
    """
    rows: Sequence[Row] = comparison["rows"]
    base = next((row for row in rows if row["name"] == comparison["baseline"]), None)
    answer = _learned(comparison)
    if answer == "no":
        choice, what, sure, then = None, *_nothing_learned(comparison)
    elif answer == "undecided":
        choice, what, sure, then = _undecided(comparison)
    else:
        choice, what, sure, then = _choose(comparison, rows, base)
    return {
        "choice": None if choice is None else choice["name"],
        "run": None if choice is None else run_to_ship(choice),
        "undecided": answer == "undecided",
        "what": what,
        "sure": sure,
        "next": then,
        "findings": _findings(comparison),
    }


def run_to_ship(row: Row) -> str:
    """The row's run with the lowest validation loss; of the first seed if none was measured.

    Test scores do not decide: a run chosen by them would score lower on new rows than it did here.
    """
    losses = row.get("validation_losses") or []
    known = [(loss, at) for at, loss in enumerate(losses) if loss is not None]
    stable = [at for at, seed in enumerate(row["seeds"]) if seed not in (row.get("collapsed") or [])]
    candidates = [(loss, at) for loss, at in known if at in stable]
    at = min(candidates)[1] if candidates else (stable or [0])[0]
    return str(row["runs"][at])


def _learned(comparison: Mapping[str, Any]) -> Learned | None:
    """Whether any method is above the most frequent answer; None if that is not known."""
    majority = comparison["majority"]
    if majority is None:
        return None
    counts = {task: about["n"] for task, about in comparison["tasks"].items()}
    answers = [learned(_scores(row), majority["tasks"], counts) for row in comparison["rows"]]
    if None in answers:
        return None
    return next((answer for answer in ("yes", "undecided") if answer in answers), "no")


def _scores(row: Row) -> dict[str, float]:
    return {task: score["mean"] for task, score in row["tasks"].items() if score["mean"] is not None}


def _nothing_learned(comparison: Mapping[str, Any]) -> tuple[str, str, str]:
    best = max(comparison["rows"], key=lambda row: row["mean"]["mean"])
    often = comparison["majority"]["mean"]
    return (
        f"Nothing was learned: no method beats always giving the most frequent answer ({number(often)}); the highest "
        f"mean score is {number(best['mean']['mean'])} ({best['label']}).",
        f"{_seeds(comparison)}; differences between methods are not meaningful.",
        learn_more(comparison.get("settings") or {}),
    )


def _undecided(comparison: Mapping[str, Any]) -> tuple[Row | None, str, str, str]:
    """LoRA, or the cheapest method: where nothing speaks for another, simple and cheap does."""
    best = max(comparison["rows"], key=lambda row: row["mean"]["mean"])
    stable = [row for row in comparison["rows"] if not row.get("collapsed")]
    lora = next((row for row in stable if row["name"] == "lora"), None)
    choice = lora or (_cheapest(stable, None) if stable else None)
    highest = "the highest, " if len(comparison["rows"]) > 1 else ""
    then = f"Add test rows. {learn_more(comparison.get('settings') or {})}"
    if choice is not None:
        cheapest = "" if choice is not _cheapest(stable, lora) else ", the cheapest"
        then += f" Until then, `braidlora export` with --best exports {choice['label']}{cheapest}, with a warning."
    return (
        choice,
        undecided(
            sum(about["n"] for about in comparison["tasks"].values()),
            f"{number(best['mean']['mean'])} ({highest}{best['label']})",
            number(comparison["majority"]["mean"]),
        ),
        f"{_seeds(comparison)}; differences between methods are not meaningful.",
        then,
    )


def _choose(
    comparison: Mapping[str, Any], rows: Sequence[Row], base: Row | None
) -> tuple[Row | None, str, str, str]:
    ship = "Run `braidlora export` on this folder with --best to export it."
    stable = [row for row in rows if not row.get("collapsed")]
    if len(rows) == 1:
        [row] = rows
        return (
            row,
            f"{row['label']} scores {spread(row['mean'])}; there was no other method to compare it with.",
            _seeds(comparison),
            ship,
        )
    if not stable:
        return (
            None,
            "No recommendation: every method has a run that collapsed.",
            _seeds(comparison),
            "Lower the learning rate or lengthen the warm-up, and compare again.",
        )
    if len(stable) == 1:
        [row] = stable
        others = [one["label"] for one in rows if one is not row]
        return (
            row,
            f"Use {row['label']} ({spread(row['mean'])}): {listed(others)} had a run that collapsed.",
            f"{_seeds(comparison)}; no difference was tested, because runs that fall into two groups have no CI.",
            ship,
        )
    compared = [row for row in stable if row is not base and row["difference"] is not None]
    better = [row for row in compared if mark(row["difference"]) == "above"]
    if base is None or not compared:
        best = max(stable, key=lambda row: row["mean"]["mean"])
        what = f"Use {best['label']}, which scores highest ({spread(best['mean'])}); its lead was not tested."
        return (
            best,
            what,
            f"{_seeds(comparison)}; there is no baseline with the same seeds and test rows.",
            ship,
        )
    if better:
        best = max(better, key=lambda row: row["mean"]["mean"])
        what = f"Use {best['label']}: {_points(best)} over {base['label']}, at {_times(best, base)}."
        sure = f"the {_ci(best, comparison)} excludes 0; {_seeds(comparison)}"
        if others := [row["label"] for row in better if row is not best]:
            verb = "is" if len(others) == 1 else "are"
            sure += f". Not tested against {listed(others)}, which {verb} also better than {base['label']}"
        return best, what, f"{sure}.", ship
    close = [base, *(row for row in compared if mark(row["difference"]) != "below")]
    close = [row for row in close if row in stable] or compared
    cheapest = _cheapest(close, base)
    if len(close) == 1 and cheapest is base:
        what = f"Use {base['label']}: significantly better than {_others(compared)}."
        return base, what, f"every {_level(comparison)} CI excludes 0; {_seeds(comparison)}.", ship
    seconds = number(cheapest["seconds"]["mean"], 0)
    worth = f"{number(cheapest['trainable_parameters'], 0)} parameters, {seconds} s per run"
    others = [row for row in close if row is not cheapest]
    what = (
        f"Use {cheapest['label']}, the cheapest ({worth}): {_others(others)} "
        f"{'is' if len(others) == 1 else 'are'} not significantly different."
        if cheapest is base
        else f"Use {cheapest['label']}, the cheapest ({worth}): not significantly different from {base['label']}."
    )
    widest = max((row for row in compared if row in close), key=lambda row: row["difference"]["high"])
    sure = (
        f"{widest['label']} {_points(widest)}, {_ci(widest, comparison)}: a lead of up to "
        f"{number(widest['difference']['high'])} points is not ruled out; {_seeds(comparison)}."
    )
    return cheapest, what, sure, ship


def _findings(comparison: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = comparison["rows"]
    found = [f"{failed['run']} failed: {failed['reason']}" for failed in comparison["failed"]]
    base = comparison["base"]
    if base is not None and base["mean"] is not None:
        worse = [row for row in rows if row["mean"]["mean"] < base["mean"]]
        if worse:
            scores = listed([f"{row['label']} ({number(row['mean']['mean'])})" for row in worse])
            found.append(
                f"Worse than the untrained base model ({number(base['mean'])}): {scores}. Lower the learning rate, or "
                "train on rows and prompts that resemble the test rows."
            )
    found += data_findings(comparison.get("data") or {})
    found += _not_learned(comparison)
    found += _collapses(rows)
    untuned = [row for row in rows if not _has_own_rate(row)]
    if len(rows) > 1 and untuned and not any(row["tuning"] for row in rows):
        found.append(_untuned(comparison, untuned))
    found += _at_the_edge(rows)
    return found + _few_seeds(len(comparison["seeds"]))


def _not_learned(comparison: Mapping[str, Any]) -> list[str]:
    """Single tasks on which no method beats the most frequent answer, where others were learned."""
    answer = _learned(comparison)
    if answer in ("no", None):
        return []
    best: dict[str, float] = {}
    for row in comparison["rows"]:
        for task, score in _scores(row).items():
            best[task] = max(score, best.get(task, score))
    counts = {task: about["n"] for task, about in comparison["tasks"].items()}
    found = []
    if tasks := tasks_by_learned(best, comparison["majority"]["tasks"], counts, "no"):
        found.append(
            f"Not learned by any method: {task_list(tasks)}; no score beats always giving the most frequent answer. "
            "Check these tasks' rows, and train longer or raise the learning rate."
        )
    tasks = tasks_by_learned(best, comparison["majority"]["tasks"], counts, "undecided")
    if tasks and answer == "yes":
        found.append(too_few_rows(tasks))
    return found


def _collapses(rows: Sequence[Row]) -> list[str]:
    found = []
    for row in rows:
        if collapsed := row.get("collapsed"):
            scores = dict(zip(row["seeds"], row["mean"]["values"], strict=True))
            others = [value for seed, value in scores.items() if seed not in collapsed]
            runs = ", ".join(f"seed {seed} scores {scores[seed]:.1f}" for seed in collapsed)
            found.append(
                f"{row['label']} collapsed: {runs}, the other seeds score {min(others):.1f} to {max(others):.1f}. A CI "
                "cannot describe runs that fall into two groups. Check the collapsed run's loss (a lower learning "
                "rate or a "
                "longer warm-up often helps) and compare again, or run more seeds to see how often it happens."
            )
    return found


def _has_own_rate(row: Row) -> bool:
    """Whether the row sets its learning rate, as a sweep and a variant may."""
    return "training.learning_rate" in (row.get("overrides") or {})


def _untuned(comparison: Mapping[str, Any], rows: Sequence[Row]) -> str:
    rate = (comparison.get("settings") or {}).get("learning_rate")
    at = f" ({rate:g})" if rate is not None else ""
    validated = any(
        loss is not None for row in comparison["rows"] for loss in row.get("validation_losses") or ()
    ) or any(parts.get("validation", {}).get("rows") for parts in (comparison.get("data") or {}).values())
    needs = "" if validated else " (requires validation rows: --split.validation=0.1)"
    which = "all methods" if len(rows) == len(comparison["rows"]) else listed([row["label"] for row in rows])
    return (
        f"Not tuned: {which} ran at the recipe's learning rate{at}, which may favor some of them. Compare with "
        f"--tune auto, which also tries one third of that rate and three times that rate for every method{needs}."
    )


def _at_the_edge(rows: Sequence[Row]) -> list[str]:
    """Rows whose best learning rate is the smallest or largest one tried, beyond which may be a better one."""
    key = "training.learning_rate"
    edges: dict[tuple[float, str], list[str]] = {}
    for row in rows:
        tried = [entry["values"][key] for entry in row["tuning"] or () if key in entry["values"]]
        if len(set(tried)) > 1 and (best := row["tuned"][key]) in (min(tried), max(tried)):
            side = "smallest" if best == min(tried) else "largest"
            edges.setdefault((best, side), []).append(row["label"])
    return [
        f"The {side} learning rate tried ({best:g}) was best for {listed(labels)}: a {side.removesuffix('est')}er one "
        "may be better still. Add it to --tune training.learning_rate=A,B,C; finished runs are kept."
        for (best, side), labels in edges.items()
    ]


def _few_seeds(seeds: int) -> list[str]:
    if seeds == 1:
        return [
            "One seed only: the CIs cover the choice of test rows, not the randomness of training, and another seed "
            "may reverse the order. Use at least three (--seeds 0,1,2)."
        ]
    if seeds == 2:
        return [
            "Two seeds say little about the variation between seeds, so the CIs are wide; use three or more."
        ]
    return []


def _cheapest(rows: Sequence[Row], first: Row | None) -> Row:
    """The row with the fewest parameters; of several `first`, because seconds depend on what else the machine did."""
    return min(rows, key=lambda row: (row["trainable_parameters"], row is not first, row["seconds"]["mean"]))


def _times(row: Row, base: Row) -> str:
    parameters = row["trainable_parameters"] / base["trainable_parameters"]
    seconds = row["seconds"]["mean"] / base["seconds"]["mean"]
    return f"{parameters:.2f} times its trainable parameters and {seconds:.2f} times its run time"


def _points(row: Row) -> str:
    return f"{number(row['difference']['mean'], sign=True)} points"


def _level(comparison: Mapping[str, Any]) -> str:
    return f"{comparison['confidence']:.0%}"


def _ci(row: Row, comparison: Mapping[str, Any]) -> str:
    low, high = (number(row["difference"][key], sign=True) for key in ("low", "high"))
    return f"{_level(comparison)} CI {low} to {high}"


def _seeds(comparison: Mapping[str, Any]) -> str:
    rows = sum(about["n"] for about in comparison["tasks"].values())
    return f"{plural(len(comparison['seeds']), 'seed')}, {plural(rows, 'test row')}"


def _others(rows: Sequence[Row]) -> str:
    return listed([row["label"] for row in rows])

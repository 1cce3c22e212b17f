"""Figures of a federation: scores and losses by round and client, spread, bytes against score, who has which rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braidlora.reporting.panels import (
    GRID_WIDTH,
    legend,
    line_style,
    panel_grid,
    plain,
    whole_numbers,
    wrapped,
)
from braidlora.reporting.plot import SEQUENTIAL, Plot, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = {
    "before": "As received, before local training",
    "after": "After local training",
    "aggregated": "Aggregated",
}
_PANELS = 20  # clients with a panel of their own
_NAMED = 7  # more lines than colours cannot be told apart
_COLUMNS = 40  # of the partition
_LONGEST = 24  # characters of a label or answer that can name a column
_WRITTEN = 300  # cells that still carry their number
_TALLEST = 12.0  # inches of the partition
_BANDS = (
    "Line: mean over clients. Dark band: the middle half of them. Pale band: from the lowest to the highest."
)

Points = list[tuple[int, float]]


def federated_plots(federated: Mapping[str, Any]) -> list[Plot]:
    """Every figure that the rounds give something to draw for.

    Args:
        federated: what `read_federation` gives.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rounds = federated["rounds"]
    plots = []
    if any(line["means"][stage] is not None for line in rounds for stage in STAGES):
        plots += [_score_plot(rounds, federated["metrics"]), _spread_plot(rounds), _bytes_plot(rounds)]
    plots += [_loss_plot(rounds), _partition_plot(federated["partition"])]
    return plots


def _score_plot(rounds: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Plot:
    scores = {stage: _by_client(rounds, stage) for stage in STAGES}
    clients = sorted({name for by_client in scores.values() for name in by_client})
    shown = clients
    if len(clients) > _PANELS:
        final = {name: metrics["clients"].get(name, {}).get("mean") for name in clients}
        shown = sorted(clients, key=lambda name: (final[name] is None, final[name]))[:_PANELS]
    with style():
        figure, panels = panel_grid(len(shown), panel_height=1.45, sharex=True, sharey=True)
        for name, panel in zip(shown, panels, strict=True):
            for index, by_client in enumerate(scores.values()):
                _draw_rounds(panel, by_client.get(name, []), index)
            panel.set_title(wrapped(name, 24), fontsize=9, loc="left")
        panels[0].set_ylim(bottom=0)
        whole_numbers(panels[0])
        figure.supxlabel("Round", fontsize=9)
        figure.supylabel("Score", fontsize=9)
        legend(figure, list(STAGES.values()))
    which = (
        f"the {_PANELS} clients with the lowest final scores" if len(clients) > _PANELS else "every client"
    )
    return Plot(
        "client-scores",
        "Score of every client, round by round",
        f"Scores of {which} on its own test rows, one panel each: the model as it received it, after local training, "
        "and the aggregated model. A line that falls from after training to aggregated shows what averaging costs.",
        figure,
    )


def _spread_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    with style():
        figure, panels = new_figure(GRID_WIDTH, 2.6, 1, len(STAGES), sharex=True, sharey=True)
        for index, (panel, (stage, title)) in enumerate(zip(panels, STAGES.items(), strict=True)):
            _draw_spread(panel, _by_client(rounds, stage), index)
            panel.set_title(title, fontsize=9, loc="left")
        panels[0].set_ylim(bottom=0)
        whole_numbers(panels[0])
        panels[0].set_ylabel("Score")
        figure.supxlabel("Round", fontsize=9)
    return Plot(
        "client-spread",
        "Spread over clients",
        f"{_BANDS} A band that widens while the mean rises says that some clients gain and others do not.",
        figure,
    )


def _bytes_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    sent = list(itertools.accumulate((line["bytes"]["up"] + line["bytes"]["down"]) / 1e6 for line in rounds))
    told = ""
    with style():
        figure, axes = new_figure(GRID_WIDTH * 0.6, 2.6)
        for index, (stage, label) in enumerate(STAGES.items()):
            points = [
                (so_far, line["means"][stage])
                for so_far, line in zip(sent, rounds, strict=True)
                if line["means"][stage] is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), **line_style(index), marker="o", markersize=4, label=label
                )
                told = f"{points[-1][1]:.1f} after {points[-1][0]:,.1f} MB"
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("MB sent so far, up and down, all clients together")
        axes.set_ylabel("Mean score")
        axes.legend(frameon=False, fontsize=8)
    return Plot(
        "bytes",
        "Score against bytes",
        f"Mean score over clients against everything that was sent, one dot per scored round; {told} in the end.",
        figure,
    )


def _loss_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    losses = _by_client(rounds, "loss")
    named = len(losses) <= _NAMED
    with style():
        figure, axes = new_figure(GRID_WIDTH * 0.75, 2.6)
        if named:
            for index, points in enumerate(losses.values()):
                _draw_rounds(axes, points, index)
            legend(figure, list(losses))
        else:
            _draw_spread(axes, losses, 0)
        whole_numbers(axes)
        axes.set_xlabel("Round")
        axes.set_ylabel("Training loss")
        axes.set_ylim(bottom=0)
    return Plot(
        "client-losses",
        "Training loss of the clients",
        "Mean loss of local training in every round. " + ("One line per client." if named else _BANDS),
        figure,
    )


def _partition_plot(partition: Mapping[str, Any]) -> Plot:
    counts, columns, what = _training_rows(partition)
    clients = list(counts)
    with style():
        width = min(GRID_WIDTH, 2.6 + 0.55 * len(columns))
        figure, axes = new_figure(width, 1.3 + min(max(0.2 * len(clients), 0.6), _TALLEST))
        image = axes.imshow(
            list(counts.values()), aspect="auto", cmap=SEQUENTIAL, vmin=0, interpolation="nearest"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(
            range(len(columns)),
            [plain(name) for name in columns],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
        every = math.ceil(0.2 * len(clients) / _TALLEST)  # names that have room
        axes.set_yticks(range(0, len(clients), every), [plain(name) for name in clients[::every]])
        if len(clients) * len(columns) <= _WRITTEN:
            half = max(itertools.chain.from_iterable(counts.values())) / 2
            for (place, row), column in itertools.product(enumerate(counts.values()), range(len(columns))):
                shade = "black" if row[column] > half else "white"
                axes.text(
                    column, place, f"{row[column]:,}", ha="center", va="center", fontsize=7, color=shade
                )
        figure.colorbar(image, ax=axes, label="Training rows", fraction=0.05)
    sizes = {name: sum(row) for name, row in counts.items()}
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    told = f"{least} has the fewest ({sizes[least]:,}), {most} the most ({sizes[most]:,})"
    if sizes[least] == sizes[most]:
        told = f"Every client has {sizes[most]:,}"
    return Plot("partition", "Who has which rows", f"Training rows by client and {what}. {told}.", figure)


def _training_rows(partition: Mapping[str, Any]) -> tuple[dict[str, list[int]], list[str], str]:
    """Counts by client, the names of the columns, and what these are: labels or answers if all are known, or tasks."""
    rows = {
        client: {task: parts["train"] for task, parts in one["tasks"].items() if "train" in parts}
        for client, one in partition.items()
    }
    tasks = sorted({task for by_task in rows.values() for task in by_task})
    values = [
        (task, value)
        for task in tasks
        for value in sorted(
            {v for by_task in rows.values() for v in (by_task.get(task, {}).get("values") or {})}
        )
    ]
    limited = all(part["values"] is not None for by_task in rows.values() for part in by_task.values())
    told_apart = limited and len(values) <= _COLUMNS and all(len(value) <= _LONGEST for _, value in values)
    if not told_apart:
        counts = {
            c: [by_task.get(task, {"rows": 0})["rows"] for task in tasks] for c, by_task in rows.items()
        }
        return counts, tasks, "task"
    counts = {
        client: [by_task.get(task, {"values": {}})["values"].get(value, 0) for task, value in values]
        for client, by_task in rows.items()
    }
    names = [value if len(tasks) == 1 else f"{task}: {value}" for task, value in values]
    return counts, names, "label or answer"


def _by_client(rounds: Sequence[Mapping[str, Any]], key: str) -> dict[str, Points]:
    """`(round, value)` by client, in the rounds that have a value; scores of the clients that are followed."""
    found: dict[str, Points] = {}
    for line in rounds:
        followed = line.get("sample", line["clients"]) if key in STAGES else line["clients"]
        for name, one in line["clients"].items():
            if name in followed and one.get(key) is not None:
                found.setdefault(name, []).append((line["round"], one[key]))
    return dict(sorted(found.items()))


def _draw_rounds(axes: Axes, points: Points, index: int) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **line_style(index), marker="o", markersize=3)


def _draw_spread(axes: Axes, by_client: Mapping[str, Points], index: int) -> None:
    """Mean over clients by round, on a band from the lowest to the highest and one of the middle half."""
    by_round: dict[int, list[float]] = {}
    for number, value in itertools.chain.from_iterable(by_client.values()):
        by_round.setdefault(number, []).append(value)
    rounds = sorted(by_round)
    if not rounds:
        return
    columns = [by_round[number] for number in rounds]
    quarters = [statistics.quantiles(v, method="inclusive") if len(v) > 1 else v * 3 for v in columns]
    look = line_style(index)
    lows, highs = [min(values) for values in columns], [max(values) for values in columns]
    axes.fill_between(rounds, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
    axes.fill_between(
        rounds,
        [q[0] for q in quarters],
        [q[2] for q in quarters],
        color=look["color"],
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(rounds, [statistics.fmean(values) for values in columns], **look, marker="o", markersize=3)

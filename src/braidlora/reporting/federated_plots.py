"""Figures of a federation: scores and losses by round and client, spread, score by bytes sent, who has which rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braidlora.reporting.heat_map import heat_map
from braidlora.reporting.panels import GRID_WIDTH, integer_ticks, legend, line_style, panel_grid, wrapped
from braidlora.reporting.plot import Plot, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = {
    "before": "As received, before local training",
    "after": "After local training",
    "aggregated": "Aggregated",
}
_PANELS = 20  # clients with a panel of their own
_NAMED = 7  # more lines than colors cannot be distinguished
_COLUMNS = 40  # of the partition
_LONGEST = 24  # characters of a label or answer that can name a column
_WRITTEN = 300  # cells that still carry their number
_TALLEST = 12.0  # inches of the partition
_BANDS = (
    "Line: mean over clients. Dark band: the middle half of them. Pale band: from the lowest to the highest."
)

Points = list[tuple[int, float]]


def federated_plots(federated: Mapping[str, Any]) -> list[Plot]:
    """Every figure that the rounds have data for.

    Args:
        federated: what `read_federation` returns.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rounds = federated["rounds"]
    plots = []
    if any(line["means"][stage] is not None for line in rounds for stage in STAGES):
        plots += [_score_plot(rounds, federated["metrics"]), _spread_plot(rounds), _bytes_plot(rounds)]
    if _by_client(rounds, "loss"):  # clients may keep their losses to themselves
        plots.append(_loss_plot(rounds))
    return [*plots, _partition_plot(federated["partition"])]


@style()
def _score_plot(rounds: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Plot:
    scores = {stage: _by_client(rounds, stage) for stage in STAGES}
    clients = sorted({name for by_client in scores.values() for name in by_client})
    shown, which = clients, "every client"
    if len(clients) > _PANELS:
        final = {name: metrics["clients"].get(name, {}).get("mean") for name in clients}
        shown = sorted(clients, key=lambda name: (final[name] is None, final[name]))[:_PANELS]
        which = f"the {_PANELS} clients with the lowest final scores"
    figure, panels = panel_grid(len(shown), panel_height=1.45, sharex=True, sharey=True)
    for name, panel in zip(shown, panels, strict=True):
        for index, by_client in enumerate(scores.values()):
            _draw_rounds(panel, by_client.get(name, []), index)
        panel.set_title(wrapped(name, 24))
    _round_axes(figure, panels[0])
    figure.supylabel("Score")
    legend(figure, list(STAGES.values()))
    return Plot(
        "client-scores",
        "Score of every client, round by round",
        f"Scores of {which} on its own test rows, one panel each: the model as received, after local training, and the "
        "aggregated model. A drop from after training to aggregated is what averaging costs.",
        figure,
    )


@style()
def _spread_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    figure, panels = new_figure(GRID_WIDTH, 2.6, 1, len(STAGES), sharex=True, sharey=True)
    for index, (panel, (stage, title)) in enumerate(zip(panels, STAGES.items(), strict=True)):
        _draw_spread(panel, _by_client(rounds, stage), index)
        panel.set_title(title)
    _round_axes(figure, panels[0])
    panels[0].set_ylabel("Score")
    return Plot(
        "client-spread",
        "Spread over clients",
        f"{_BANDS} If a band widens while the mean rises, some clients gain and others do not.",
        figure,
    )


@style()
def _bytes_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    sent = list(itertools.accumulate((line["bytes"]["up"] + line["bytes"]["down"]) / 1e6 for line in rounds))
    last = ""
    figure, axes = new_figure(GRID_WIDTH * 0.6, 2.6)
    for index, (stage, label) in enumerate(STAGES.items()):
        points = [
            (so_far, line["means"][stage])
            for so_far, line in zip(sent, rounds, strict=True)
            if line["means"][stage] is not None
        ]
        _draw_rounds(axes, points, index, markersize=4, label=label)
        if points:
            last = f"{points[-1][1]:.1f} after {points[-1][0]:,.1f} MB"
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("MB sent so far, uploads and downloads of all clients")
    axes.set_ylabel("Mean score")
    axes.legend(frameon=False)
    return Plot(
        "bytes",
        "Score by bytes sent",
        f"Mean score over clients by total bytes sent, one dot per scored round; {last} at the end.",
        figure,
    )


@style()
def _loss_plot(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    losses = _by_client(rounds, "loss")
    named = len(losses) <= _NAMED
    figure, axes = new_figure(GRID_WIDTH * 0.75, 2.6)
    if named:
        for index, points in enumerate(losses.values()):
            _draw_rounds(axes, points, index)
        legend(figure, list(losses))
    else:
        _draw_spread(axes, losses, 0)
    integer_ticks(axes)
    axes.set_xlabel("Round")
    axes.set_ylabel("Training loss")
    axes.set_ylim(bottom=0)
    return Plot(
        "client-losses",
        "Training loss of the clients",
        f"Mean loss of local training in every round. {'One line per client.' if named else _BANDS}",
        figure,
    )


@style()
def _partition_plot(partition: Mapping[str, Any]) -> Plot:
    counts, columns, what = _training_rows(partition)
    clients = list(counts)
    width = min(GRID_WIDTH, 2.6 + 0.55 * len(columns))
    figure, axes = new_figure(width, 1.3 + min(max(0.2 * len(clients), 0.6), _TALLEST))
    image = heat_map(
        axes, list(counts.values()), clients, columns, limits=(0.0, None), digits=0,
        written=len(clients) * len(columns) <= _WRITTEN, every=math.ceil(0.2 * len(clients) / _TALLEST),
    )  # fmt: skip
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Training rows", fraction=0.05)
    sizes = {name: sum(row) for name, row in counts.items()}
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    extremes = f"{least} has the fewest ({sizes[least]:,}), {most} the most ({sizes[most]:,})"
    if sizes[least] == sizes[most]:
        extremes = f"Every client has {sizes[most]:,}"
    return Plot(
        "partition",
        "Training rows of the clients",
        f"Training rows by client and {what}. {extremes}.",
        figure,
    )


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
    limited = all(part.get("values") is not None for by_task in rows.values() for part in by_task.values())
    distinct = limited and len(values) <= _COLUMNS and all(len(value) <= _LONGEST for _, value in values)
    if not distinct:
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
    """`(round, value)` by client, in the rounds that have a value; scores only of the clients scored in every round."""
    found: dict[str, Points] = {}
    for line in rounds:
        scored = line.get("sample", line["clients"]) if key in STAGES else line["clients"]
        for name, one in line["clients"].items():
            if name in scored and one.get(key) is not None:
                found.setdefault(name, []).append((line["round"], one[key]))
    return dict(sorted(found.items()))


def _round_axes(figure: Any, axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    integer_ticks(axes)
    figure.supxlabel("Round")


def _draw_rounds(
    axes: Axes, points: Sequence[tuple[float, float]], index: int, markersize: float = 3, **options: Any
) -> None:
    if points:
        look = line_style(index)
        axes.plot(*zip(*points, strict=True), **look, marker="o", markersize=markersize, **options)


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
    extremes, halves = [(min(v), max(v)) for v in columns], [(q[0], q[2]) for q in quarters]
    for bounds, alpha in ((extremes, 0.12), (halves, 0.2)):
        low, high = zip(*bounds, strict=True)
        axes.fill_between(rounds, low, high, color=line_style(index)["color"], alpha=alpha, linewidth=0)
    _draw_rounds(axes, [(r, statistics.fmean(v)) for r, v in zip(rounds, columns, strict=True)], index)

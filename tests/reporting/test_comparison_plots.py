"""The figures show the numbers of the comparison, and say in words what is to be seen."""

import numpy as np
import pytest
from comparisons import comparison

from braidlora.reporting.comparison_plots import (
    difference_plot,
    sweep_plot,
    task_difference_plot,
    task_plot,
)
from braidlora.reporting.panels import line_style, panel_grid, wrapped

SWEEP = {"key": "adapter.num_experts", "values": [1, 2, 8], "matched": "parameters"}


def test_bars_are_as_long_as_the_scores():
    given = comparison(["LoRA", "MoE-LoRA", "ALoRA"], ["a", "b"])
    plot = task_plot(given)
    for panel, task in zip(plot.figure.axes, given["tasks"], strict=True):
        expected = [row["tasks"][task]["mean"] for row in given["rows"]]
        np.testing.assert_allclose([bar.get_width() for bar in panel.patches], expected)
        yardsticks = sorted(line.get_xdata()[0] for line in panel.lines if len(set(line.get_xdata())) == 1)
        wanted = [given["references"]["scores"][task]["mean"], given["base"]["tasks"][task]]
        assert set(wanted) <= set(yardsticks)


def test_a_task_without_a_score_is_said_not_to_be_scored():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    given["rows"][1]["tasks"]["a"] = None
    panel = task_plot(given).figure.axes[0]
    assert len(panel.patches) == 1
    assert [text.get_text().strip() for text in panel.texts] == ["not scored"]


def test_differences_are_drawn_in_the_order_of_the_table():
    given = comparison(["LoRA", "MoE-LoRA", "ALoRA"], ["a", "b"])
    plot = difference_plot(given)
    [axes] = plot.figure.axes
    dots = axes.collections[1].get_offsets()
    np.testing.assert_allclose(
        dots, [[row["difference"]["mean"], at] for at, row in enumerate(given["rows"][1:])]
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MoE-LoRA", "ALoRA"]


def test_the_caption_names_what_is_significant_and_what_is_not():
    given = comparison(["LoRA", "HydraLoRA", "MoE-LoRA", "ALoRA"], ["a", "b"])
    for row, (low, high) in zip(given["rows"][1:], [(1, 2), (-1, 1), (-2, -1)], strict=True):
        row["difference"] |= {"low": low, "high": high}
    caption = difference_plot(given).caption
    assert (
        "Significantly above LoRA: HydraLoRA. Significantly below LoRA: ALoRA. "
        "Not significantly different from LoRA: MoE-LoRA." in caption
    )


def test_task_differences_have_one_panel_per_method():
    given = comparison(["LoRA", "MoE-LoRA", "ALoRA"], ["a", "b", "c"])
    given["rows"][2]["difference"]["tasks"] = {
        "a": {"mean": 3.0, "low": 1.0, "high": 5.0},
        "b": {"mean": -3.0, "low": -5.0, "high": -1.0},
    }
    plot = task_difference_plot(given)
    assert [panel.get_title(loc="left") for panel in plot.figure.axes] == ["MoE-LoRA", "ALoRA"]
    assert "ALoRA above on 1, below on 1" in plot.caption


def test_there_is_no_figure_of_differences_without_any():
    alone = comparison(["LoRA"], ["a", "b"])
    assert difference_plot(alone) is None
    assert task_difference_plot(alone) is None
    assert sweep_plot(alone) is None


def test_a_sweep_has_a_line_per_method_and_a_level_one_for_what_was_not_swept():
    labels = ["LoRA", *(f"ALoRA, num_experts = {value}" for value in SWEEP["values"])]
    given = comparison(labels, ["a", "b"], sweep=SWEEP)
    plot = sweep_plot(given)
    mean, worst = plot.figure.axes
    level, swept = [list(line.lines[0].get_ydata()) for line in mean.containers]
    assert len(set(level)) == 1
    assert swept == [row["mean"]["mean"] for row in given["rows"][1:]]
    assert list(worst.containers[1].lines[0].get_ydata()) == [
        row["worst"]["mean"] for row in given["rows"][1:]
    ]
    assert "trained parameters" in plot.caption


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 9, 20])
def test_a_grid_has_as_many_panels_as_asked_for(count):
    figure, panels = panel_grid(count, panel_height=1.0)
    assert len(panels) == len(figure.axes) == count


def test_every_method_has_a_look_of_its_own():
    looks = {(look["color"], str(look["linestyle"])) for look in map(line_style, range(12))}
    assert len(looks) == 12


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short", "short"),
        ("a_task_with_quite_a_long_name.10-of-them", "a_task_with_quite_a_long_\nname.10-of-them"),
        ("x" * 30, "x" * 28 + "\n" + "x" * 2),
        ("start" + "-" * 90 + "end", "start" + "-" * 22 + "…\n" + "-" * 25 + "end"),
        ("a$b$c", r"a\$b\$c"),
    ],
)
def test_long_names_take_two_lines(text, shown):
    assert wrapped(text) == shown

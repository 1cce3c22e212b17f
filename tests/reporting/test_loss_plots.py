"""Loss curves: read from logs, averaged over seeds, drawn per task."""

import json
import random

import numpy as np
import pytest
from comparisons import comparison, write_logs

from braidlora.errors import CheckpointError
from braidlora.reporting.loss_plots import average, loss_plots, read_losses


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_losses_are_read_by_task_and_kind_of_line(tmp_path):
    log = write(
        tmp_path / "log.jsonl",
        [
            {"step": 1, "tasks": {"a": 2.0, "b": 3.0}},
            {"step": 2, "validation_tasks": {"a": 2.5}},
            {"step": 3, "tasks": {"a": 1.0}},
        ],
    )
    assert read_losses(log) == {"a": [(1, 2.0), (3, 1.0)], "b": [(1, 3.0)]}
    assert read_losses(log, "validation_tasks") == {"a": [(2, 2.5)]}
    assert read_losses(tmp_path / "none.jsonl") == {}


def test_a_damaged_line_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "tasks": {}}\n{"step": 2, "ta', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"log\.jsonl:2: .*remove it"):
        read_losses(log)


def test_few_steps_are_averaged_one_by_one():
    seeds = [[(10, 4.0), (20, 2.0)], [(10, 2.0), (20, 1.0), (30, 0.5)]]
    points = average(seeds)
    assert [step for step, _, _ in points] == [10, 20, 30]
    np.testing.assert_allclose([mean for _, mean, _ in points], [3.0, 1.5, 0.5])
    np.testing.assert_allclose(
        [std for _, _, std in points], [np.std([4, 2], ddof=1), np.std([2, 1], ddof=1), 0]
    )


def test_many_steps_are_put_together_without_losing_any():
    draw = random.Random(0)
    seeds = [[(step, draw.random()) for step in range(1, 1001)] for _ in range(3)]
    points = average(seeds, bins=50)
    assert len(points) == 50
    losses = np.array([[loss for _, loss in seed] for seed in seeds]).reshape(3, 50, 20).mean(axis=2)
    np.testing.assert_allclose([mean for _, mean, _ in points], losses.mean(axis=0))
    np.testing.assert_allclose([std for _, _, std in points], losses.std(axis=0, ddof=1))
    np.testing.assert_allclose(
        [step for step, _, _ in points], np.arange(1, 1001).reshape(50, 20).mean(axis=1)
    )


def test_one_panel_per_task_and_one_line_per_method(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["a", "b", "c"])
    write_logs(tmp_path, given, steps=20, every=10)
    [plot] = loss_plots(given, tmp_path)
    assert plot.name == "training-loss"
    panels = plot.figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["a", "b", "c"]
    assert [len(panel.lines) for panel in panels] == [2, 2, 2]
    losses = [read_losses(tmp_path / run / "log.jsonl")["b"] for run in given["rows"][1]["runs"]]
    np.testing.assert_allclose(panels[1].lines[1].get_ydata(), np.array(losses)[:, :, 1].mean(axis=0))


def test_validation_losses_are_a_figure_of_their_own(tmp_path):
    given = comparison(["LoRA"], ["a"], [0])
    write_logs(tmp_path, given)
    with open(tmp_path / given["rows"][0]["runs"][0] / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 60, "validation_loss": 1.0, "validation_tasks": {"a": 1.0}}\n')
    assert [plot.name for plot in loss_plots(given, tmp_path)] == ["training-loss", "validation-loss"]


def test_without_logs_there_is_no_figure(tmp_path):
    assert loss_plots(comparison(["LoRA"], ["a"]), tmp_path) == []

"""How long a comparison takes is measured on its own runs."""

import json
from types import SimpleNamespace

import pytest

from braidlora.comparison._progress import Measured, Progress, Work, in_words, measure, seconds_left
from braidlora.config import load_config
from braidlora.runs import RunDirectory


def cell(folder, name="lora-seed0", **more):
    config = load_config("demo", [f"--output={folder / name}", "--training.epochs=2"])
    run = RunDirectory(folder / name)
    run.path.mkdir(parents=True, exist_ok=True)
    values = {
        "name": name,
        "config": config,
        "run": run,
        "kind": "train",
        "evaluate": True,
        "is_done": lambda: False,
    }
    return SimpleNamespace(**values | more)


def log(one, step, epoch, seconds, loss=1.5):
    line = {"step": step, "epoch": epoch, "loss": loss, "tasks": {}, "timing": {"seconds": seconds}}
    with open(one.run.log, "a") as file:
        file.write(json.dumps(line) + "\n")


def test_the_work_of_a_run():
    tasks = [
        SimpleNamespace(name=task.name, train=[0] * 300, test=[0] * 100) for task in load_config("demo").tasks
    ]
    one = SimpleNamespace(config=load_config("demo", ["--training.epochs=2"]), kind="train", evaluate=True)
    assert Work.of(one, tasks) == Work(2 * 8 * 300, 800)
    one.config = load_config("demo", ["--training.max_steps=10"])
    assert (
        Work.of(one, tasks).train
        == 10 * one.config.training.batch_size * one.config.training.gradient_accumulation
    )
    one.kind = "base"
    assert Work.of(one, tasks) == Work(0.0, 800)


def test_a_running_run_is_measured_by_its_log_and_predictions(tmp_path):
    one, work = cell(tmp_path), Work(1000.0, 50)
    assert measure(one, work) == Measured()
    log(one, 10, 0.5, 20.0)
    assert measure(one, work) == Measured(250.0, 0.0, 20.0, 0.0, 1.5)
    with open(one.run.log, "a") as file:
        file.write('{"step": 11, "validation_loss": 1.0}\n{"step": 12, "lo')  # half a line
    assert measure(one, work).train == 250.0
    one.run.predictions.mkdir()
    (one.run.predictions / "sum.jsonl").write_text("{}\n" * 7)
    assert measure(one, work).test == 7
    timing = {"training_seconds": 40.0, "evaluation_seconds": 5.0}
    one.run.metrics.write_text(json.dumps({"timing": timing}))
    assert measure(one, work) == Measured(1000.0, 50, 40.0, 5.0)


def test_the_time_left():
    works = [Work(100.0, 10)] * 3
    nothing = [Measured()] * 3
    assert seconds_left(works, nothing, 1, [False] * 3) == (None, False)
    begun = [Measured(50.0, 0.0, 5.0), Measured(), Measured()]
    assert seconds_left(works, begun, 1, [False] * 3) == (pytest.approx(25.0), False)
    first = [Measured(100.0, 10, 10.0, 2.0), Measured(), Measured()]
    assert seconds_left(works, first, 1, [True, False, False]) == (pytest.approx(24.0), True)
    assert seconds_left(works, first, 2, [True, False, False]) == (pytest.approx(12.0), True)
    assert seconds_left(works, first, 8, [True, False, False])[0] == pytest.approx(12.0)  # no run is split


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (42, "42 s"), (600, "10 min"), (5400, "1 h 30 min"), (7260, "2 h 01 min")],
)
def test_times_are_read_by_people(seconds, text):
    assert in_words(seconds) == text


def test_lines_say_what_is_done_and_what_is_left(tmp_path, capsys):
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b")]
    with Progress(cells, [Work(1000.0, 0)] * 2, 1, show=True) as bar:
        assert bar.estimate() == "the total time is estimated after the first steps"
        log(cells[0], 10, 2.0, 100.0)
        bar.finished("a", "[1/2] a")
        bar.finished("b", "[2/2] b: failed")
    assert capsys.readouterr().err.splitlines() == ["[1/2] a; about 2 min left", "[2/2] b: failed"]


def test_a_comparison_that_goes_on_knows_its_time_at_the_start(tmp_path, capsys):
    cells = [cell(tmp_path, "a", is_done=lambda: True), cell(tmp_path, "b")]
    timing = {"training_seconds": 300.0, "evaluation_seconds": 60.0}
    cells[0].run.metrics.write_text(json.dumps({"timing": timing}))
    with Progress(cells, [Work(1000.0, 10)] * 2, 1, show=False) as bar:
        assert bar.estimate() == "about 6 min, based on earlier runs"
        bar.say("nothing is shown")
    assert capsys.readouterr().err == ""


def test_the_status_has_share_loss_and_time_left(tmp_path):
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b")]
    log(cells[0], 10, 1.0, 100.0, loss=0.75)
    with Progress(cells, [Work(1000.0, 0)] * 2, 1, show=False) as bar:
        assert bar._status() == "[0/2]  a 50% loss 0.750  about 5 min left"

"""benchmarks/rules_side_by_side.py without training: the trials of learning rates, and the plan."""

import json
import math
from pathlib import Path

import pytest


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import rules_side_by_side

    return rules_side_by_side


@pytest.fixture
def table(benchmark_module):
    from federated_tables import Group, Table, rule

    groups = {
        "equal": Group(
            {"local": rule("local"), "fedit": rule("fedit")}, baseline="fedit", options=["--group"]
        )
    }
    return Table("fed_demo", groups, (3, 4), ["--all"], rates=(1e-3, 1e-2), held_out=["--held"])


def finish(federation, score):
    folder = federation.directory.path
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"mean": score, "seconds": 60}))


def test_a_trial_is_scored_on_held_out_rows_of_the_first_seed(benchmark_module, table, tmp_path):
    one = benchmark_module.trials(tmp_path, table)["equal"]["fedit"][1e-2]
    output = tmp_path / "tuning" / "equal-fedit-0.01-seed3"
    assert one.options == [
        "--all", "--group", "--federation.rule=fedit", "--held", "--training.learning_rate=0.01", "--seed=3",
        f"--output={output}",
    ]  # fmt: skip
    assert one.may_fail


def test_the_highest_score_decides_and_a_trial_that_diverged_does_not_count(
    benchmark_module, table, tmp_path, monkeypatch
):
    tried = benchmark_module.trials(tmp_path, table)
    scores = {("local", 1e-3): 40.0, ("local", 1e-2): 40.0, ("fedit", 1e-3): 1.0, ("fedit", 1e-2): -math.inf}
    for (row, rate), score in scores.items():
        monkeypatch.setitem(
            tried["equal"][row], rate, type("One", (), {"score": lambda self, score=score: score})()
        )
    rates = benchmark_module.best_rates(tried)
    assert rates == {"equal": {"local": 1e-3, "fedit": 1e-3}}
    [local, _] = benchmark_module.federations(tmp_path, table, (3, 4), rates)["equal"]["local"]
    assert local.options == [
        "--all", "--group", "--federation.rule=local", "--training.learning_rate=0.001", "--seed=3",
        f"--output={tmp_path / 'equal-local-seed3'}",
    ]  # fmt: skip
    assert not local.may_fail


def test_an_unfinished_trial_has_the_lowest_score(benchmark_module, table, tmp_path):
    assert benchmark_module.trials(tmp_path, table)["equal"]["fedit"][1e-2].score() == -math.inf


def test_the_plan_counts_what_is_done(benchmark_module, table, tmp_path):
    assert (
        "tuning 4 federations, 0 done; main 4, 0 done; 5.0 min each (expected), 0.7 h"
        in benchmark_module.plan(tmp_path, table, (3, 4))
    )
    [one, _] = benchmark_module.federations(tmp_path, table, (3, 4), {})["equal"]["fedit"]
    finish(one, 50.0)
    assert "main 4, 1 done; 1.0 min each (measured)" in benchmark_module.plan(tmp_path, table, (3, 4))


def test_a_table_without_rates_takes_the_recipes(benchmark_module, tmp_path):
    from federated_tables import TABLES

    table = TABLES["fed-dirichlet"]
    assert benchmark_module.trials(tmp_path, table) == {}
    [one] = benchmark_module.federations(tmp_path, table, (0,), {})["α = 1"]["fedit"]
    assert [word for word in one.options if "learning_rate" in word] == ["--training.learning_rate=4e-3"]

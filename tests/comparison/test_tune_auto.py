"""`--tune auto`, tuning of keys about experts, and what the summary says of a best value at the edge."""

import pytest
from test_advice import comparison  # noqa: F401

from braidlora.cli._compare import _tune
from braidlora.comparison._advice import advise
from braidlora.comparison._plan import Plan
from braidlora.comparison._rows import build_rows, built_in_labels
from braidlora.comparison._tables import _tuning
from braidlora.comparison._tuning import auto_grid
from braidlora.comparison.run import _methods
from braidlora.comparison.statistics import summary
from braidlora.config import RunConfig
from braidlora.errors import ConfigError

RATE = "training.learning_rate"


def recipe(**training):
    tasks = [{"name": "sum", "train": "generated:sum"}]
    return RunConfig.model_validate({"tasks": tasks, "training": training, "output": "out"})


def test_auto_tries_a_third_and_three_times_the_rate():
    assert auto_grid(recipe(learning_rate=3e-4)) == {RATE: [1e-4, 3e-4, 9e-4]}
    assert _tune(["auto"]) == "auto"
    with pytest.raises(ConfigError, match="--tune auto cannot be combined"):
        _tune(["auto", f"{RATE}=1e-3"])


def test_rows_without_experts_are_not_tried_with_values_about_experts(tmp_path):
    """LoRA would be trained several times, identically."""
    given = recipe()
    rows = {row.name: row for row in build_rows(given, ["lora", "align-lora", "alora"], {}, None, [])}
    plan = Plan(given, tmp_path, [0], {"adapter.num_experts": [2, 3], RATE: [1e-3, 3e-3]})
    for name in ("lora", "align-lora"):
        assert plan.grid(rows[name]) == [{RATE: 1e-3}, {RATE: 3e-3}]
    assert len(plan.grid(rows["alora"])) == 4
    alone = Plan(given, tmp_path, [0], {"adapter.num_experts": [2, 3]})
    assert alone.grid(rows["lora"]) == [{}]


def test_the_two_presets_are_rows_that_are_trained_on_request():
    assert {"mtl-lora", "align-lora"} <= built_in_labels().keys()
    assert _methods(None, recipe(), None) == ["lora", "lora-matched", "hydralora", "moelora", "alora"]
    assert set(_methods(["all"], recipe(), None)) == built_in_labels().keys()


def tuned(row, tried, best):
    row["tuned"] = best
    row["tuning"] = [{"values": values, "validation_loss": summary([0.5])} for values in tried]


def test_a_best_rate_at_the_edge_is_a_finding(comparison):  # noqa: F811
    tried = [{RATE: rate} for rate in (1e-4, 3e-4, 9e-4)]
    for row in comparison["rows"]:
        tuned(row, tried, {RATE: 3e-4})
    assert not any("learning rate tried" in one for one in advise(comparison)["findings"])
    tuned(comparison["rows"][0], tried, {RATE: 9e-4})
    [found] = [one for one in advise(comparison)["findings"] if "learning rate tried" in one]
    assert found.startswith("The largest learning rate tried (0.0009) was best for LoRA: a larger one")


def test_the_table_of_losses_has_a_dash_where_a_row_was_not_tried(comparison):  # noqa: F811
    rows = comparison["rows"] = comparison["rows"][:2]
    tuned(rows[0], [], None)
    tuned(rows[1], [{"adapter.num_experts": 2}, {"adapter.num_experts": 3}], {"adapter.num_experts": 3})
    _, header, lines = _tuning(comparison)
    assert header == ["", rows[1]["label"]]
    assert [line[1] for line in lines] == ["0.500", "0.500 *"]
    tuned(rows[0], [{RATE: 1e-3}, {RATE: 3e-3}], {RATE: 1e-3})
    _, header, lines = _tuning(comparison)
    assert len(lines) == 4
    assert [line.count("–") for line in lines] == [1] * 4

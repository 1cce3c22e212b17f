"""What a probe costs, against the comparison that it is a share of."""

import pytest

from braidlora.advisor.cost import METHODS, SEEDS, comparison_rows, plan_probe
from braidlora.comparison.run import _methods
from braidlora.config import load_config
from braidlora.errors import ConfigError


def test_the_methods_counted_are_those_of_a_comparison():
    assert sorted(METHODS) == sorted(_methods(None, load_config("demo"), None))


def test_rows_of_a_comparison():
    config = load_config("demo", ["--training.epochs=2"])
    assert comparison_rows(config, 2400) == 2 * 2400 * len(METHODS) * SEEDS
    steps = load_config("demo", ["--training.max_steps=10", "--training.gradient_accumulation=2"])
    assert comparison_rows(steps, 2400) == 10 * 2 * 32 * len(METHODS) * SEEDS


@pytest.mark.parametrize("share", [0.02, 0.05, 0.5])
@pytest.mark.parametrize("rows", [[300] * 8, [100] * 21, [40, 4000], [10**6] * 3])
def test_a_probe_stays_within_its_share(rows, share):
    config = load_config("demo", ["--training.epochs=2"])
    try:
        plan = plan_probe(config, rows, share)
    except ConfigError:
        assert share == 0.02  # the smallest probe of a hundred rows a task
        return
    trained, measured = plan.steps * plan.batch_size, plan.gradient_rows
    assert plan.rows == pytest.approx(len(rows) * (trained + measured * 4 / 3), abs=1)
    assert plan.share <= share
    assert plan.steps >= 4
    assert plan.gradient_rows >= 2


def test_a_comparison_too_cheap_for_a_probe_is_said_to_be():
    config = load_config("demo", ["--training.epochs=1"])
    with pytest.raises(ConfigError, match=r"--budget 0.05: the smallest probe .* costs .*%.*--budget=0\.\d+"):
        plan_probe(config, [10] * 4)
    with pytest.raises(ConfigError) as raised:
        plan_probe(config, [10] * 4)
    needed = float(str(raised.value).rpartition("--budget=")[2].rstrip("."))
    assert plan_probe(config, [10] * 4, needed).share <= needed

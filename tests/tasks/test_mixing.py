"""Mixing: shares, coverage, and that an epoch is a pure function of seed and epoch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braidlora.config import MixingSection
from braidlora.errors import ConfigError
from braidlora.tasks import MixingSampler, MultiTaskDataset, mixing_probabilities


def dataset(*sizes):
    data = MultiTaskDataset([f"t{task}" for task in range(len(sizes))], "classify")
    for task, size in enumerate(sizes):
        for _ in range(size):
            data.add(task, [1, 2], 0)
    return data


def sampler(*sizes, seed=0, **mixing):
    return MixingSampler(dataset(*sizes), MixingSection(**mixing), seed)


def draws_by_task(sampler, epoch, *sizes):
    data = dataset(*sizes)
    return Counter(data.task_ids[index] for index in sampler.indices(epoch))


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
strategies = st.sampled_from(["proportional", "uniform", "temperature"])


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_proportional_draws_every_row_once_an_epoch(sizes, seed, epoch):
    indices = sampler(*sizes, seed=seed).indices(epoch)
    assert sorted(indices) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, strategy=strategies, seed=st.integers(0, 9), epochs=st.integers(1, 7))
def test_rows_of_a_task_are_drawn_equally_often_over_time(sizes, strategy, seed, epochs):
    mixed = sampler(*sizes, seed=seed, strategy=strategy)
    drawn = Counter(index for epoch in range(epochs) for index in mixed.indices(epoch))
    start = 0
    for task, size in enumerate(sizes):
        visits = [drawn[index] for index in range(start, start + size)]
        assert max(visits) - min(visits) <= 1
        assert sum(visits) == mixed.draws[task] * epochs
        start += size


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50), rows_per_step=st.integers(1, 9))
def test_the_rows_of_a_step_are_sorted_by_length_and_stay_in_their_step(lengths, rows_per_step):
    data = MultiTaskDataset(["t"], "classify")
    for length in lengths:
        data.add(0, [1] * length, 0)
    mixed = MixingSampler(data, MixingSection(), 3, rows_per_step)
    drawn, order = mixed.drawn(1), mixed.indices(1)
    for at in range(0, len(lengths), rows_per_step):
        step = order[at : at + rows_per_step]
        assert sorted(step) == sorted(drawn[at : at + rows_per_step])
        assert [lengths[row] for row in step] == sorted(lengths[row] for row in step)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, strategy=strategies, epoch=st.integers(0, 5))
def test_an_epoch_is_as_long_as_the_rows_and_depends_on_seed_and_epoch_alone(sizes, strategy, epoch):
    mixed = sampler(*sizes, strategy=strategy)
    assert len(mixed) == sum(sizes) == len(mixed.indices(epoch))
    again = sampler(*sizes, strategy=strategy)
    again.indices(epoch + 1)  # whatever was drawn before does not matter
    again.set_epoch(epoch)
    assert list(again) == list(again) == mixed.indices(epoch)
    assert all(draws > 0 for draws in mixed.draws) or len(mixed) < len(sizes)


def test_epochs_and_seeds_differ():
    one = sampler(50, 50)
    assert one.indices(0) != one.indices(1)
    assert one.indices(0) != sampler(50, 50, seed=1).indices(0)


@pytest.mark.parametrize(
    ("mixing", "probabilities", "draws"),
    [
        ({}, [0.8, 0.15, 0.05], [80, 15, 5]),
        ({"strategy": "uniform"}, [1 / 3, 1 / 3, 1 / 3], [34, 33, 33]),
        ({"strategy": "temperature", "temperature": 1.0}, [0.8, 0.15, 0.05], [80, 15, 5]),
        ({"strategy": "temperature", "temperature": 2.0}, [0.594, 0.257, 0.149], [59, 26, 15]),
        ({"strategy": "temperature", "temperature": 1e6}, [1 / 3, 1 / 3, 1 / 3], [34, 33, 33]),
        ({"strategy": "weights", "weights": {"t0": 1, "t1": 0, "t2": 3}}, [0.25, 0.0, 0.75], [25, 0, 75]),
        ({"strategy": "weights", "weights": {"t0": 1, "t1": 1e-6, "t2": 0}}, [1.0, 0.0, 0.0], [99, 1, 0]),
    ],
)
def test_shares_of_every_strategy_are_exact(mixing, probabilities, draws):
    mixed = sampler(80, 15, 5, **mixing)
    assert list(mixed.probabilities.values()) == pytest.approx(probabilities, abs=1e-3)
    assert mixed.draws == draws
    for epoch in range(3):
        assert draws_by_task(mixed, epoch, 80, 15, 5) == {
            task: count for task, count in enumerate(draws) if count
        }


def test_tasks_are_spread_over_the_epoch():
    """Every tenth of an epoch holds about a tenth of each task's draws (six standard deviations)."""
    mixed = sampler(900, 100, strategy="uniform")
    data = dataset(900, 100)
    tasks = [data.task_ids[index] for index in mixed.indices(3)]
    for start in range(0, 1000, 100):
        assert abs(sum(tasks[start : start + 100]) - 50) < 6 * (100 * 0.5 * 0.5) ** 0.5


def test_a_task_without_rows_is_never_drawn():
    mixed = sampler(4, 0, 4, strategy="uniform")
    assert mixed.draws == [4, 0, 4]
    assert mixing_probabilities(MixingSection(), {"a": 3, "b": 0}) == {"a": 1.0, "b": 0.0}


def test_weights_on_tasks_without_rows_alone_are_refused():
    with pytest.raises(ConfigError, match="all tasks with rows have weight 0"):
        sampler(4, 0, strategy="weights", weights={"t0": 0.0, "t1": 1.0})

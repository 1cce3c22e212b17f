"""Δm%, worst task and spread against values worked out by hand, and the cases that have no value."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braidlora.evaluation.balance import balance, delta_m


def test_delta_m_by_hand():
    # (80 − 84)/80 = −0.05, (50 − 45)/50 = 0.1, (40 − 42)/40 = −0.05: they cancel
    assert delta_m({"a": 84, "b": 45, "c": 42}, {"a": 80, "b": 50, "c": 40}).value == pytest.approx(
        0, abs=1e-12
    )
    # −0.05 and −0.2: mean −0.125
    assert delta_m({"a": 84, "c": 48}, {"a": 80, "c": 40}) == (pytest.approx(-12.5), None)
    assert delta_m({"a": 60}, {"a": 80, "not scored": 0}).value == pytest.approx(25.0)


def test_the_sign_flips_for_a_metric_where_lower_is_better():
    # a: (80 − 84)/80 = −5 %; loss: −(2 − 1)/2 = −50 %, for a halved loss is better
    value = delta_m({"a": 84, "loss": 1.0}, {"a": 80, "loss": 2.0}, lower_is_better={"loss"}).value
    assert value == pytest.approx(-27.5)
    assert delta_m({"loss": 3.0}, {"loss": 2.0}, ["loss"]).value == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("scores", "references", "reason"),
    [
        ({"a": 1.0, "b": 2.0}, {"b": 1.0}, "no single-task reference for a"),
        ({"a": 1.0, "b": 2.0}, {}, "no single-task references were given"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 0.0}, "reference of b is 0; it must be above 0"),
        ({"a": 1.0}, {"a": -2.0}, "reference of a is -2"),
        ({"a": 1.0}, {"a": math.nan}, "reference of a is nan"),
        ({"a": math.nan}, {"a": 1.0}, "score of a is nan"),
        ({}, {"a": 1.0}, "no task was scored"),
    ],
)
def test_no_value_comes_with_the_reason(scores, references, reason):
    result = delta_m(scores, references)
    assert result.value is None
    assert reason in result.reason


def test_an_unknown_task_in_lower_is_better_is_refused():
    with pytest.raises(ValueError, match="no score for b; tasks are a"):
        delta_m({"a": 1.0}, {"a": 1.0}, ["b"])


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 100), min_size=1), st.data())
def test_delta_m_and_balance_equal_numpy(scores, data):
    references = {name: data.draw(st.floats(0.5, 100)) for name in scores}
    m, s = np.array(list(scores.values())), np.array(list(references.values()))
    assert delta_m(scores, references).value == pytest.approx(float(100 * np.mean((s - m) / s)), abs=1e-9)
    summary = balance(scores)
    assert summary.mean == pytest.approx(float(m.mean()), abs=1e-9)
    assert summary.std == pytest.approx(float(m.std(ddof=0)), abs=1e-9)
    assert summary.worst == m.min()
    assert scores[summary.worst_task] == m.min()


def test_the_spread_is_the_population_standard_deviation():
    # mean 5, squared deviations 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over 8 tasks: variance 4
    scores = dict(zip("abcdefgh", [2, 4, 4, 4, 5, 5, 7, 9], strict=True))
    assert balance(scores) == (5.0, 2, "a", 2.0)
    assert balance({"a": 7.0}).std == 0.0
    assert balance({}) == (None, None, None, None)


def test_the_sign_agrees_with_published_tables():
    # arXiv 2509.25414, FLAN mix on Llama-2-7B: 67.13 on average with Δm% = −8.33, so above the specialists. A mean of
    # about 62 for them gives a figure of that sign and size.
    value = delta_m({"mean": 67.13}, {"mean": 62.0}).value
    assert -10 < value < -6


def test_the_rules_and_the_balance_need_no_torch():
    rooms = "braidlora.evaluation.balance, braidlora.evaluation.extraction, braidlora.evaluation.metrics"
    code = f"import sys, {rooms}, braidlora.evaluation.table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

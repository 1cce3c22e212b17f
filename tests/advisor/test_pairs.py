"""Which tasks pull against each other, and one number for each matrix."""

import pytest

from braidlora.advisor.pairs import MEASURES, against, judge, pairs_of, summarize


@pytest.mark.parametrize(
    ("cosine", "signs", "pull"),
    [
        (-0.5, -4, "against"),
        (0.5, 4, "together"),
        (-0.5, -2, "neither"),
        (-0.05, -4, "neither"),
        (None, 0, "neither"),
    ],
)
def test_a_pull_needs_size_and_agreement_of_all_halves(cosine, signs, pull):
    assert judge(cosine, signs) == pull


@pytest.fixture
def found():
    gradients = {
        "A": {"cosine": [[0.8, 0.2, -0.4], [0.2, 0.6, 0.1], [-0.4, 0.1, 0.4]], "between": -0.1 / 3, "within": 0.6,
              "signs": [[4, 4, -4], [4, 4, 2], [-4, 2, 4]]},
        "B": {"cosine": [[0.5, None, 0.3], [None, 0.5, 0.2], [0.3, 0.2, 0.5]], "between": 0.25, "within": -0.1,
              "signs": [[4, 0, 4], [0, 4, 4], [4, 4, 4]]},
    }  # fmt: skip
    matrices = {
        "updates": [[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]],
        "columns": None,
        "inputs": [[1, 0.7, 0.8], [0.7, 1, 0.9], [0.8, 0.9, 1]],
    }
    return gradients, pairs_of(["x", "y", "z"], gradients, matrices)


def test_pairs_with_the_lowest_cosine_come_first(found):
    _, pairs = found
    assert [pair["tasks"] for pair in pairs] == [["x", "z"], ["x", "y"], ["y", "z"]]
    assert pairs[0] == {
        "tasks": ["x", "z"], "A": {"cosine": -0.4, "pull": "against"}, "B": {"cosine": 0.3, "pull": "together"},
        "updates": 0.2, "columns": None, "inputs": 0.8,
    }  # fmt: skip
    assert [pair["tasks"] for pair in against(pairs)] == [["x", "z"]]


def test_one_number_for_each_matrix(found):
    gradients, pairs = found
    measures = summarize(gradients, pairs, None)
    assert list(measures) == list(MEASURES)
    assert measures["relative_A"] == pytest.approx(-0.1 / 3 / 0.6)
    assert measures["relative_B"] is None  # the halves of a task's rows do not agree
    assert measures["columns"] is None
    assert measures["against"] == pytest.approx(1 / 3)
    assert measures["updates"] == pytest.approx(0.2)
    for pair in pairs:
        pair["columns"] = 0.55
    assert summarize(gradients, pairs, 0.1)["columns"] == pytest.approx(0.5)

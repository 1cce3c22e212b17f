"""Rules fitted on suites with a known outcome, and what `advise` says with and without one that predicts."""

import pytest

from braidlora.advisor.advice import advice
from braidlora.advisor.calibration import (
    SHARES,
    Rule,
    Suite,
    always,
    fit,
    fit_always,
    read_calibration,
    wilson,
)
from braidlora.advisor.cost import METHODS
from braidlora.advisor.pairs import MEASURES

# Where gradients oppose, moelora is best; where they agree, lora.
SUITES = [
    Suite(f"s{at}", "f", {"gradients_B": value, "inputs": 0.5}, points, [min(points, key=points.get)])
    for at, (value, points) in enumerate([
        (-0.4, {"lora": 5.0, "moelora": 0.0}),
        (-0.2, {"lora": 3.0, "moelora": 0.0}),
        (0.2, {"lora": 0.0, "moelora": 1.0}),
        (0.4, {"lora": 0.0, "moelora": 2.0, "alora": 0.5}),
    ])
]  # fmt: skip


def test_a_rule_is_found_where_there_is_one():
    rule = fit(SUITES, "gradients_B", ["lora", "moelora"])
    assert (rule.below, rule.above) == ("moelora", "lora")
    assert -0.2 < rule.threshold < 0.2
    assert [rule.pick(suite.measures) for suite in SUITES] == ["moelora", "moelora", "lora", "lora"]
    assert rule.pick({"gradients_B": None}) == "lora"


def test_without_differences_in_the_measurement_a_rule_is_one_method():
    assert fit(SUITES, "inputs", ["lora", "moelora"]).pick({"inputs": 0.1}) == "moelora"
    assert fit_always(SUITES, ["lora", "moelora"]) == always("moelora")


def test_a_table_without_a_method_counts_with_the_mean_of_the_others():
    assert fit_always(SUITES, ["lora", "alora"]) == always("alora")  # 0.5 in all four, lora 8 in sum


def test_the_interval_of_a_proportion():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)


CALIBRATION = {
    "suites": 4, "families": 2, "rule": None, "random": 0.5,
    "best_measure": {"measure": "gradients_B", "good": 3, "of": 4}, "always": {"method": "moelora", "good": 4, "of": 4},
    "lora": {"good": 3, "of": 4},
}  # fmt: skip
GRADIENTS = {"A": {"within": 0.5}, "B": {"within": None}}


def test_without_a_rule_there_is_no_advice():
    found = advice("mine", {"gradients_B": -0.4}, GRADIENTS, [], CALIBRATION)
    assert (found["share"], found["method"]) == (None, None)
    assert "on 4 suites with a known outcome none of them predicted" in found["what"]
    assert "3 of 4 by cosine of gradients on B (95% CI 30% to 95%), 4 of 4 without measuring" in found["sure"]
    assert "(mostly MoE-LoRA), 3 of 4 by always taking LoRA, 50% at random" in found["sure"]
    assert "braidlora compare mine" in found["next"]
    assert "No two tasks pull against each other" in found["conflicts"]
    assert "(two halves of one task's rows have a cosine of 0.50 on A)" in found["conflicts"]


@pytest.mark.parametrize(("value", "share", "method"), [(-0.4, "nothing", "moelora"), (0.4, "both", "lora")])
def test_a_rule_that_predicts_picks(value, share, method):
    rule = Rule("gradients_B", 0.0, "moelora", "lora").__dict__
    pair = {
        "tasks": ["a", "b"], "A": {"cosine": -0.5, "pull": "against"}, "B": {"cosine": 0.0, "pull": "neither"},
    }  # fmt: skip
    found = advice("mine", {"gradients_B": value}, GRADIENTS, [pair], {**CALIBRATION, "rule": rule})
    assert (found["share"], found["method"]) == (share, method)
    assert found["what"].startswith(f"Share {share} (")
    assert (
        "1 of 1 pair of tasks pull against each other, in all halves of their rows: a and b (A -0.50)"
        in (found["conflicts"])
    )


def test_the_package_has_a_calibration_of_the_methods_and_measurements_that_there_are():
    content = read_calibration()
    assert content["suites"] > 0
    assert content["best_measure"]["measure"] in MEASURES
    assert content["always"]["method"] in METHODS
    assert content["rule"] is None or {content["rule"]["below"], content["rule"]["above"]} <= set(METHODS)
    assert set(SHARES) == set(METHODS)

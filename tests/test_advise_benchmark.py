"""benchmarks/advise.py: what it concludes from committed measurements, again, and its sign test."""

import json
from pathlib import Path

import pytest
from scipy import stats

from braidlora.advisor.calibration import Suite, read_calibration

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import advise

    return advise


@pytest.fixture
def committed(benchmark):
    return json.loads(benchmark.RESULT.read_text(encoding="utf-8"))


def test_the_package_has_what_the_benchmark_found(benchmark, committed):
    assert read_calibration() == benchmark.package_copy(committed)


def test_rules_and_picks_follow_from_the_tables_and_the_measurements(benchmark, committed):
    tables = benchmark.tables()
    suites = []
    for entry in committed["suites"]:
        suite = benchmark.suite_of(entry["name"], tables[entry["name"]], entry["measures"])
        assert suite.points == pytest.approx(entry["points"])
        assert sorted(suite.good) == sorted(entry["good"])
        suites.append(suite)
    found = benchmark.judge_rules(suites)
    for left_out in ("suite", "family"):
        assert found[left_out]["always"]["picks"] == committed[left_out]["always"]["picks"]
        for measure, one in found[left_out]["measures"].items():
            assert one["picks"] == committed[left_out]["measures"][measure]["picks"]
    assert found["rule"] == committed["rule"]


def test_without_the_probes_folders_the_committed_measurements_are_taken(
    benchmark, committed, monkeypatch, tmp_path
):
    monkeypatch.setattr(benchmark, "RUNS", tmp_path)
    again = benchmark.calibrate()
    assert [suite["name"] for suite in again["suites"]] == [suite["name"] for suite in committed["suites"]]
    assert again["suites"][0]["measures"] == committed["suites"][0]["measures"]
    monkeypatch.setattr(benchmark, "RESULT", tmp_path / "advise.json")
    assert benchmark.probe_of("suite") is None


def test_every_probe_cost_at_most_a_twentieth(committed):
    assert all(suite["cost"]["share_of_rows"] <= 0.05 for suite in committed["suites"])


def test_a_rule_that_predicts_is_found(benchmark):
    """In twelve families of their own, what is best depends on the gradients alone."""
    suites = []
    for at in range(12):
        value = (at - 5.5) / 6 + (0.5 if at > 5 else -0.5)
        lora, moelora = (0.0, 2.0 + at % 3) if value > 0 else (2.0 + at % 3, 0.0)
        measures = dict.fromkeys(benchmark.MEASURES, 0.5) | {"gradients_B": value}
        good = ["lora"] if value > 0 else ["moelora"]
        suites.append(Suite(f"s{at}", f"f{at}", measures, {"lora": lora, "moelora": moelora}, good))
    found = benchmark.judge_rules(suites)
    assert (found["rule"]["measure"], found["rule"]["below"], found["rule"]["above"]) == (
        "gradients_B", "moelora", "lora",
    )  # fmt: skip
    assert found["family"]["measures"]["gradients_B"]["good"] == 12
    assert found["family"]["always"]["good"] < 12


def test_the_sign_test_is_that_of_scipy(benchmark):
    behind, other = [0.0, 0.0, 1.0, 0.5, 0.0], [1.0, 2.0, 0.5, 0.5, 3.0]
    expected = stats.binomtest(3, 4, alternative="greater").pvalue
    assert benchmark.sign_test(behind, other) == pytest.approx(expected)
    assert benchmark.sign_test([1.0], [1.0]) == 1.0

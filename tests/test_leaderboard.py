"""docs/leaderboard.md: the page, its ranks, and its words for claims, with and without the files of suites."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import document_leaderboard
    import leaderboard_claims
    import leaderboard_tables

    class All:
        page, claims, tables = document_leaderboard, leaderboard_claims, leaderboard_tables

    return All


def test_the_page_is_what_the_script_draws():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "document_leaderboard.py"), "--check"], check=True)


def test_a_page_that_is_out_of_date_is_exit_code_1(scripts, monkeypatch, tmp_path, capsys):
    (tmp_path / "page.md").write_text("older")
    monkeypatch.setattr(scripts.page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["document_leaderboard.py", "--check"])
    assert scripts.page.main() == 1
    assert "run python scripts/document_leaderboard.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["document_leaderboard.py"])
    assert scripts.page.main() == 0
    assert "## Which published claims held here" in (tmp_path / "page.md").read_text()


def test_without_any_file_everything_is_not_run_yet(scripts, tmp_path):
    page = scripts.page.page(tmp_path)
    for name in [*scripts.page.WANTED, *scripts.page.FEDERATED]:
        assert f"- `{name}` (" in page
    words = [
        line.partition("**")[2].partition("**")[0] for line in page.split("\n") if line.startswith("- **")
    ]
    assert len(words) == len(scripts.claims.CLAIMS) + 4
    assert set(words) == {"not run yet"}


def test_a_suite_appears_with_its_file(scripts, tmp_path):
    shutil.copy(RESULTS / "suite.json", tmp_path)
    shutil.copy(RESULTS / "fed-sentences.json", tmp_path)
    page = scripts.page.page(tmp_path)
    assert "- `sentences6` (six classification tasks, MiniLM): not run yet" in page
    assert "- `demo` (" not in page
    assert "| ALoRA | 2.4 × | 1.2 × | 1 (" in page
    assert "| +2.8 [−0.9, +6.5] |" in page
    row = json.loads((RESULTS / "fed-sentences.json").read_text())["groups"][""]["rows"]["ffa-lora"][
        "difference"
    ]
    assert f"{row['mean']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]".replace("-", "−") in page
    assert "Here, `ffa-lora` − `fedit`: fed_sentences −16.4" in page


def test_evidence_counts_as_tuned(scripts, tmp_path):
    comparison = json.loads((RESULTS / "suite.json").read_text())
    comparison["recipe"]["name"] = "induction21"
    evidence = {"kind": "evidence", "command": "x", "comparison": comparison, "tuning": [], "single": {}}
    (tmp_path / "induction.json").write_text(json.dumps(evidence))
    page = scripts.page.page(tmp_path)
    assert "- induction21 (induction): learning rate tuned for every row" in page
    assert "Only induction tuned the learning rate for every row." in page


def test_a_federated_table_with_trials_for_every_row_counts_as_tuned(scripts, tmp_path):
    table = json.loads((RESULTS / "fed-sentences.json").read_text())
    table["recipe"] = "benchmarks/fed_induction.yaml"
    rows = table["groups"][""]["rows"]
    for row in rows.values():
        row["tuning"] = {"0.001": 50.0, "0.003": 52.0}
    (tmp_path / "fed-induction.json").write_text(json.dumps(table))
    page = scripts.page.page(tmp_path)
    assert "- fed_induction: learning rate tuned for every row" in page
    assert "- `fed_induction` (" not in page
    rows["fedit"]["tuning"] = {}
    (tmp_path / "fed-induction.json").write_text(json.dumps(table))
    assert "- fed_induction: one learning rate for all rows" in scripts.page.page(tmp_path)


# ---- ranks


def test_ranks_are_those_of_means_and_pairwise_intervals(scripts):
    values = {
        "first": [60.0, 62.0, 61.0, 63.0, 62.0],
        "near": [59.0, 62.5, 60.0, 63.5, 61.0],
        "last": [40.0, 41.0, 39.5, 43.0, 41.0],
    }
    found = scripts.tables.ranks(values)
    assert [(one.rank, one.low, one.high) for one in found.values()] == [(1, 1, 2), (2, 1, 2), (3, 3, 3)]
    # the same from SciPy's paired t-test, at 2.5% for each of two comparisons
    ahead = sum(stats.ttest_rel(values[name], values["last"]).pvalue < 0.05 / 2 for name in ("first", "near"))
    assert found["last"].low == 1 + ahead


def test_a_paired_interval_is_student_s(scripts):
    a, b = [51.0, 50.0, 54.0, 53.0], [50.0, 50.5, 51.0, 52.0]
    mean, low, high = scripts.tables.paired(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert scripts.tables.paired([1.0], [2.0]) is None
    assert scripts.tables.paired([1.0, 2.0], [2.0]) is None


def test_one_seed_rules_nothing_out(scripts):
    found = scripts.tables.ranks({"a": [90.0], "b": [10.0]})
    assert [(one.rank, one.low, one.high) for one in found.values()] == [(1, 1, 2), (2, 1, 2)]


# ---- claims


@pytest.mark.parametrize(
    ("gap", "at_least", "word"),
    [
        ((2.0, 0.5, 3.5), False, "confirmed"), ((2.0, -0.5, 4.5), False, "not seen"),
        ((-2.0, -3.5, -0.5), False, "contradicted"), ((0.1, -0.8, 1.0), True, "confirmed"),
        ((0.1, -1.2, 1.4), True, "not seen"), ((-0.5, -0.9, -0.1), True, "contradicted"),
    ],
)  # fmt: skip
def test_the_word_of_a_suite(scripts, gap, at_least, word):
    assert scripts.claims.verdict(gap, at_least) == word


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "not run yet"),
        (["confirmed"], "confirmed"),
        (["confirmed", "confirmed", "not seen"], "confirmed (2 confirmed, 1 not seen)"),
        (["confirmed", "not seen"], "not seen (1 confirmed, 1 not seen)"),
        (["confirmed", "contradicted", "contradicted"], "depends on the suite (1 confirmed, 2 contradicted)"),
    ],
)
def test_the_word_of_all_suites(scripts, words, said):
    assert scripts.claims.overall(words) == said


def test_a_difference_is_the_table_s_own_in_either_direction(scripts):
    suite = scripts.tables.comparisons(scripts.tables.read_results(RESULTS))["suite"]
    own = suite.entries["alora"].row["difference"]
    assert scripts.claims.difference(suite, "alora", "lora") == (own["mean"], own["low"], own["high"])
    assert scripts.claims.difference(suite, "lora", "alora") == (-own["mean"], -own["high"], -own["low"])
    by_seed = scripts.tables.paired(suite.entries["alora"].values, suite.entries["moelora"].values)
    assert scripts.claims.difference(suite, "alora", "moelora") == by_seed
    assert scripts.claims.difference(suite, "alora", "mtl-lora") is None


def test_the_rows_that_claims_name_exist(scripts):
    from braidlora.federated import RULE_NAMES

    for claim in scripts.claims.CLAIMS:
        names = scripts.tables.METHODS if claim.of == "multi-task" else RULE_NAMES
        assert {claim.higher, claim.lower} <= set(names)

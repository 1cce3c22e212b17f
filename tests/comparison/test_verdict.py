"""The verdict says no more than the intervals do, and the tables hold what they should."""

import copy

import pytest

from braidlora.comparison import as_markdown, as_text
from braidlora.comparison._advice import advise
from braidlora.comparison._verdict import details, verdict
from braidlora.comparison.statistics import summary


def row(name, label, values, difference=None, **more):
    tasks = {
        "up": summary([value - 10 for value in values]),
        "rev": summary([value + 10 for value in values]),
    }
    return {
        "name": name, "label": label, "overrides": {}, "tuned": None, "tuning": [], "trainable_parameters": 1000,
        "seconds": summary([10.0] * len(values)), "peak_memory_mib": summary([500.0] * len(values)),
        "seeds": list(range(len(values))), "tasks": tasks, "mean": summary(values),
        "worst": {**summary([value - 10 for value in values]), "tasks": ["up"] * len(values)},
        "delta_m": None, "delta_m_reason": "none were trained", "difference": difference, "difference_reason": None,
        "runs": [f"cells/{name}-seed{seed}" for seed in range(len(values))], **more,
    }  # fmt: skip


def against(low, mean, high, **tasks):
    return {
        "baseline": "lora", "mean": mean, "low": low, "high": high, "values": [mean] * 3,
        "tasks": {name: {"low": a, "mean": b, "high": c} for name, (a, b, c) in tasks.items()},
    }  # fmt: skip


@pytest.fixture
def comparison():
    rows = [
        row("lora", "LoRA", [50.0, 52.0, 54.0]),
        row("alora", "ALoRA", [55.0, 57.0, 59.0], against(2.0, 5.0, 8.0, up=(4.0, 8.0, 12.0), rev=(-1.0, 2.0, 5.0)),
            trainable_parameters=1500, seconds=summary([12.0] * 3)),
        row("hydralora", "HydraLoRA", [51.0, 51.0, 52.0],
            against(-4.0, -0.7, 3.0, up=(-9.0, -6.0, -3.0), rev=(1.0, 4.6, 8.0))),
    ]  # fmt: skip
    return {
        "format": 1, "recipe": {"name": "two tasks", "yaml": ""}, "command": "braidlora compare demo",
        "environment": {"versions": {"torch": "2.6"}, "machine": {"processor": "a CPU"}, "date": "2026-01-01"},
        "tasks": {"up": {"metric": "rouge1", "n": 40}, "rev": {"metric": "accuracy", "n": 60}}, "seeds": [0, 1, 2],
        "baseline": "lora", "confidence": 0.95, "memory": "the process", "rows": rows, "failed": [], "sweep": None,
        "references": {"runs": None, "scores": None, "reason": "none were trained"},
        "base": {"tasks": {"up": 1.0, "rev": 3.0}, "mean": 2.0}, "majority": None,
    }  # fmt: skip


def test_it_names_the_best_and_says_whether_that_can_be_told(comparison):
    said = details(comparison)
    assert said[0] == (
        "ALoRA has the highest mean score, 57.0 ± 2.0 over 3 seeds, and 47.0 ± 2.0 on its worst task (up); "
        "it is significantly better than LoRA."
    )
    assert said[1] == (
        "ALoRA is significantly better than LoRA (+5.0 points, 95% CI +2.0 to +8.0); it gains on up (+8.0)."
    )
    assert said[2] == (
        "HydraLoRA is not significantly different from LoRA (-0.7 points, 95% CI -4.0 to +3.0); it gains on rev "
        "(+4.6) and loses on up (-6.0)."
    )
    assert "ALoRA 1.50 and 1.20; HydraLoRA 1.00 and 1.00" in " ".join(said)
    assert "Δm% is not available: none were trained." in said


def test_scores_at_the_most_frequent_answer_are_not_praised(comparison):
    comparison["majority"] = {"tasks": {"up": 60.0, "rev": 60.0}, "mean": 60.0}
    said = details(comparison)
    assert said[0] == (
        "No method beats the most frequent answer, which scores 60.0; the highest is ALoRA with 57.0 ± 2.0 over 3 "
        "seeds."
    )
    assert not any("highest mean score" in sentence for sentence in said)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 8.0), (0.0, 8.0), (-3.0, 0.0)])
def test_an_interval_that_holds_zero_is_no_difference(comparison, low, high):
    comparison["rows"][1]["difference"] |= {"low": low, "high": high}
    said = details(comparison)
    assert said[0].endswith("; but it is not significantly different from LoRA.")
    assert said[1].startswith("ALoRA is not significantly different from LoRA (")
    assert not any("better" in sentence or "worse than" in sentence for sentence in said)


def test_a_worse_row_is_called_worse(comparison):
    comparison["rows"][2]["difference"] |= {"low": -4.0, "mean": -2.0, "high": -1.0}
    assert details(comparison)[2].startswith("HydraLoRA is significantly worse than LoRA (-2.0 points")


def test_a_row_alone_is_not_called_the_highest(comparison):
    comparison["rows"] = comparison["rows"][:1]
    assert details(comparison)[0].startswith("LoRA scores 52.0 ± 2.0 over 3 seeds, and ")


def test_the_baseline_may_be_the_best(comparison):
    comparison["rows"][0]["mean"] = summary([90.0, 91.0, 92.0])
    assert details(comparison)[0].startswith("LoRA has the highest mean score, 91.0 ± 1.0 over 3 seeds")
    assert details(comparison)[0].endswith("(up); but it is not significantly different from HydraLoRA.")


@pytest.mark.parametrize(
    ("alora", "hydralora", "said"),
    [
        ((-9.0, -1.0), (-9.0, -1.0), "(up); it is significantly better than every other method."),
        ((-9.0, 1.0), (-9.0, -1.0), "(up); but it is not significantly different from ALoRA."),
        ((-9.0, 1.0), (-9.0, 1.0), "(up); but it is not significantly different from any other method."),
        (None, (-9.0, -1.0), "(up); it is significantly better than HydraLoRA."),
        (None, None, "(up)."),
    ],
)
def test_a_best_baseline_is_set_against_every_other_row(comparison, alora, hydralora, said):
    comparison["rows"][0]["mean"] = summary([90.0, 91.0, 92.0])
    for row, interval in zip(comparison["rows"][1:], (alora, hydralora), strict=True):
        if interval is None:
            row |= {"difference": None, "difference_reason": "other seeds"}
        else:
            row["difference"] |= dict(zip(("low", "high"), interval, strict=True))
    assert details(comparison)[0].endswith(said)


@pytest.mark.parametrize(("seeds", "said"), [(1, "One seed only"), (2, "Two seeds say little"), (3, None)])
def test_few_seeds_are_warned_of(comparison, seeds, said):
    comparison["seeds"] = list(range(seeds))
    warned = [
        finding
        for finding in advise(comparison)["findings"]
        if "seed only" in finding or "seeds say" in finding
    ]
    assert [sentence.startswith(said) for sentence in warned] == ([] if said is None else [True])


def test_many_single_tasks_are_said_to_differ_by_chance_now_and_then(comparison):
    tasks = {f"task{number}": {"low": -1.0, "mean": 0.0, "high": 1.0} for number in range(19)}
    comparison["rows"][1]["difference"]["tasks"] = {**tasks, "odd": {"low": 1.0, "mean": 2.0, "high": 3.0}}
    assert any("of 22 such CIs, about 1 would exclude 0 by chance" in said for said in details(comparison))
    comparison["rows"][1]["difference"]["tasks"] = tasks
    comparison["rows"][2]["difference"]["tasks"] = tasks
    assert not any("by chance" in said for said in details(comparison))


def test_several_rows_against_one_baseline_differ_by_chance_more_often_than_one(comparison):
    assert not any("CIs are not corrected for multiple comparisons" in said for said in details(comparison))
    comparison["rows"].append(
        row("moelora", "MoE-LoRA", [51.0, 51.0, 52.0], against(-4.0, -0.7, 3.0, up=(-9.0, 0.0, 3.0)))
    )
    assert any("one of 3 would still exclude 0 in up to 14% of" in said for said in details(comparison))
    for one in comparison["rows"][1:]:
        one["difference"] |= {"low": -1.0, "high": 1.0}
    assert not any("CIs are not corrected for multiple comparisons" in said for said in details(comparison))


def test_what_cannot_be_compared_and_what_failed_is_said(comparison):
    comparison["rows"][1] |= {"difference": None, "difference_reason": "alora has finished with the seeds 0"}
    comparison["failed"] = [{"run": "alora-seed1", "reason": "the loss is nan."}]
    said = " ".join(verdict(comparison, advise(comparison)))
    assert "ALoRA cannot be compared with the baseline: alora has finished with the seeds 0." in said
    assert "alora-seed1 failed: the loss is nan." in said


def test_the_best_delta_m_is_the_lowest(comparison):
    comparison["rows"][0]["delta_m"] = summary([1.0, 2.0, 3.0])
    comparison["rows"][1]["delta_m"] = summary([-1.0, -2.0, -3.0])
    assert any(
        "ALoRA does best: Δm% -2.0 ± 1.0, on average better than models" in said
        for said in details(comparison)
    )


def test_a_delta_m_within_the_spread_of_its_seeds_is_not_called_a_lead(comparison):
    """With three seeds t is 4.30, so ± 1.0 reaches 2.5 far."""
    comparison["rows"][1]["delta_m"] = summary([-1.0, -2.0, -3.0])
    assert any("not significantly different from 0 (± 2.5 at 95%)." in said for said in details(comparison))
    for clear in ([-6.0, -7.0, -8.0], [-2.0]):
        comparison["rows"][1]["delta_m"] = summary(clear)
        assert not any("different from 0" in said for said in details(comparison))


def test_a_delta_m_that_single_answers_decide_says_little(comparison):
    tasks = list(comparison["tasks"])
    comparison["rows"][0]["delta_m"] = summary([1.0, 2.0, 3.0])
    comparison["references"]["scores"] = {task: summary([50.0, 50.0, 50.0]) for task in tasks}
    assert "says little" not in "\n".join(details(comparison))
    comparison["references"]["scores"][tasks[1]] = summary([0.0, 2.0, 1.0])
    rows = comparison["tasks"][tasks[1]]["n"]
    change = 100 / len(tasks) * (100 / rows) / 1.0
    [said] = [one for one in details(comparison) if "says little" in one]
    assert f"one more correct answer in {tasks[1]} changes it by {change:.1f} points" in said
    assert "its single-task LoRA scores 1.0" in said
    assert said.endswith(f"leave out {tasks[1]}.")
    comparison["rows"][0]["delta_m"] = None
    assert "says little" not in "\n".join(details(comparison)), "no Δm% is shown"


def test_tables_hold_every_row_task_and_reference(comparison):
    comparison |= {"advice": advise(comparison), "details": details(comparison)}
    text = as_text(comparison)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert "ALoRA 1,500 57.0 ± 2.0 47.0 ± 2.0 (up) – +5.0 [+2.0, +8.0] 12 500" in lines
    assert "up rouge1 40 1.0 42.0 ± 2.0 47.0 ± 2.0 41.3 ± 0.6" in lines
    assert "mean 2.0 52.0 ± 2.0 57.0 ± 2.0 51.3 ± 0.6" in lines
    markdown = as_markdown(comparison)
    assert markdown.startswith("# two tasks: 3 rows compared\n\n**Use ALoRA: +5.0 points over LoRA,")
    assert "| ALoRA | 1,500 | 57.0 ± 2.0 | 47.0 ± 2.0 (up) | – | +5.0 [+2.0, +8.0] | 12 | 500 |" in markdown
    assert "    braidlora compare demo\n" in markdown


def test_with_one_task_neither_a_worst_task_nor_single_tasks_are_shown(comparison):
    for one in comparison["rows"]:
        del one["tasks"]["rev"]
    del comparison["tasks"]["rev"]
    comparison["rows"] = comparison["rows"][:1]
    comparison |= {"advice": advise(comparison), "details": details(comparison)}
    text = as_text(comparison)
    assert "Δm%" not in text
    assert "worst task" not in text
    comparison["rows"][0]["delta_m"] = summary([1.0, 2.0, 3.0])  # of given references
    assert "Δm%" in as_text(comparison)


def test_a_table_with_more_methods_than_fit_is_transposed(comparison):
    one = comparison["rows"][1]
    comparison["rows"] += [{**copy.deepcopy(one), "name": f"r{n}", "label": f"Row {n}"} for n in range(9)]
    comparison |= {"advice": advise(comparison), "details": details(comparison)}
    lines = [line.split() for line in as_text(comparison).split("\n")]
    assert ["up", "rev", "mean"] in lines
    assert ["Row", "3", "47.0", "±", "2.0", "67.0", "±", "2.0", "57.0", "±", "2.0"] in lines


def test_a_collapsed_run_is_named_and_nothing_is_claimed_of_its_method(comparison):
    alora = comparison["rows"][1]
    alora |= {"mean": summary([55.0, 12.0, 56.0]), "collapsed": [1]}
    alora["difference"] |= {"low": 1.0, "mean": 5.0, "high": 9.0, "judged": False}
    said = verdict(comparison, advise(comparison))
    assert (
        "No conclusion about ALoRA compared with LoRA (+5.0 points, 95% CI +1.0 to +9.0): a run collapsed."
        in said
    )
    assert any(
        sentence.startswith("ALoRA collapsed: seed 1 scores 12.0, the other seeds score 55.0 to 56.0.")
        for sentence in said
    )
    assert not any("ALoRA is significantly" in sentence for sentence in said)
    assert not any("different from ALoRA" in sentence for sentence in said)


def test_comparisons_of_earlier_versions_have_no_word_of_collapses(comparison):
    assert "collapsed" not in comparison["rows"][0]
    assert not any("collapse" in sentence for sentence in details(comparison))

"""What a comparison advises: one line each for what to use, with what confidence, and what to do next."""

import json

import pytest
from test_verdict import against, comparison, row  # noqa: F401 (the fixture)

from braidlora.comparison._advice import advise, run_to_ship
from braidlora.comparison.best import best_run
from braidlora.comparison.statistics import summary
from braidlora.errors import CheckpointError, ConfigError


@pytest.fixture
def equal(comparison):  # noqa: F811
    """No method differs from LoRA."""
    for one in comparison["rows"][1:]:
        one["difference"] |= {"low": -3.0, "mean": 0.5, "high": 4.0}
    return comparison


def test_a_method_that_is_better_is_to_be_taken_at_its_cost(comparison):  # noqa: F811
    advice = advise(comparison)
    assert (advice["choice"], advice["run"]) == ("alora", "cells/alora-seed0")
    assert advice["what"] == (
        "Use ALoRA: +5.0 points over LoRA, at 1.50 times its trainable parameters and 1.20 times its run time."
    )
    assert advice["sure"] == "the 95% CI +2.0 to +8.0 excludes 0; 3 seeds, 100 test rows."
    assert "with --best to export it" in advice["next"]


def test_where_nothing_differs_the_cheapest_is_to_be_taken(equal):
    advice = advise(equal)
    assert advice["choice"] == "lora"
    assert advice["what"] == (
        "Use LoRA, the cheapest (1,000 parameters, 10 s per run): ALoRA and HydraLoRA are not significantly different."
    )
    assert "a lead of up to 4.0 points is not ruled out; 3 seeds, 100 test rows." in advice["sure"]


def test_a_cheaper_method_that_does_not_differ_is_taken_over_the_baseline(equal):
    equal["rows"][2]["trainable_parameters"] = 500
    assert advise(equal)["what"].startswith("Use HydraLoRA, the cheapest (500 parameters, 10 s per run)")


def test_the_baseline_is_taken_over_a_method_of_its_size_that_happened_to_run_faster(equal):
    equal["rows"][2]["trainable_parameters"] = equal["rows"][0]["trainable_parameters"]
    equal["rows"][2]["seconds"] = summary([1.0, 1.0, 1.0])
    assert advise(equal)["choice"] == "lora"


def test_a_baseline_that_beats_all_others(comparison):  # noqa: F811
    for one in comparison["rows"][1:]:
        one["difference"] |= {"low": -9.0, "mean": -5.0, "high": -1.0}
    advice = advise(comparison)
    assert advice["what"] == "Use LoRA: significantly better than ALoRA and HydraLoRA."
    assert advice["sure"].startswith("every 95% CI excludes 0")


def test_nothing_was_learned_where_no_method_beats_the_most_frequent_answer(comparison):  # noqa: F811
    comparison["majority"] = {"tasks": {"up": 50.0, "rev": 66.0}, "mean": 58.0}
    comparison["settings"] = {"learning_rate": 3e-4, "epochs": 3.0, "max_steps": None}
    advice = advise(comparison)
    assert advice["choice"] is advice["run"] is None
    assert advice["what"] == (
        "Nothing was learned: no method beats always giving the most frequent answer (58.0); the highest mean score is "
        "57.0 (ALoRA)."
    )
    assert advice["next"] == (
        "Train longer (--training.epochs=6, now 3) or raise the learning rate (--training.learning_rate=0.0009, now "
        "0.0003)."
    )


def test_scores_that_chance_explains_are_undecided(comparison):  # noqa: F811
    """With 100 rows, a few points above the most frequent answer are within two standard errors."""
    comparison["majority"] = {"tasks": {"up": 5.0, "rev": 5.0}, "mean": 5.0}
    assert advise(comparison)["what"].startswith("Use ALoRA")
    assert advise(comparison)["undecided"] is False
    comparison["majority"] = {"tasks": {"up": 43.0, "rev": 63.0}, "mean": 53.0}
    advice = advise(comparison)
    assert advice["what"] == (
        "Too few test rows (100) to say whether anything was learned: the mean score is 57.0 (the highest, ALoRA), and "
        "always giving the most frequent answer scores 53.0."
    )
    assert (advice["choice"], advice["run"], advice["undecided"]) == ("lora", "cells/lora-seed0", True)
    assert advice["next"].startswith("Add test rows.")
    assert advice["next"].endswith("with --best exports LoRA, the cheapest, with a warning.")
    comparison["rows"] = comparison["rows"][1:]
    assert advise(comparison)["choice"] == "hydralora"  # the cheapest
    for one in comparison["rows"]:
        one["collapsed"] = [0]
    assert advise(comparison)["run"] is None


def test_a_task_within_the_error_has_too_few_rows(comparison):  # noqa: F811
    best = max(one["tasks"]["up"]["mean"] for one in comparison["rows"])
    comparison["majority"] = {"tasks": {"up": best - 1.0, "rev": 5.0}, "mean": 25.0}
    found = advise(comparison)["findings"]
    assert any(one.startswith("Too few test rows to say whether it was learned: up;") for one in found)
    assert not any(one.startswith("Not learned") for one in found)


def test_single_tasks_that_nobody_learned_are_a_finding(comparison):  # noqa: F811
    comparison["majority"] = {"tasks": {"up": 60.0, "rev": 5.0}, "mean": 32.5}
    assert any(one.startswith("Not learned by any method: up;") for one in advise(comparison)["findings"])


def test_worse_than_the_base_is_a_finding(comparison):  # noqa: F811
    assert not any("Worse than the untrained base" in one for one in advise(comparison)["findings"])
    comparison["base"]["mean"] = 55.0
    found = advise(comparison)["findings"]
    assert found[0] == (
        "Worse than the untrained base model (55.0): LoRA (52.0) and HydraLoRA (51.3). Lower the learning rate, or "
        "train on rows and prompts that resemble the test rows."
    )


def test_labels_never_seen_rows_cut_and_rows_seen_before_are_findings(comparison):  # noqa: F811
    comparison["data"] = {
        "up": {
            "train": {"rows": 100, "encoded": {"rows": 90, "dropped": 10, "truncated": 30}},
            "test": {"rows": 40, "in_train": 4, "unseen_labels": {"new": 3, "newer": 1}},
        },
        "rev": {
            "train": {"rows": 100, "encoded": {"rows": 100, "dropped": 0, "truncated": 1}},
            "test": {"rows": 60},
        },
    }
    found = "\n".join(advise(comparison)["findings"])
    assert "up: 4 test rows of 40 have a label that no training row has ('new', 'newer')" in found
    assert "up: 4 of 40 test rows are also training rows" in found
    assert "prompt.cutoff: 30% of up truncated because the rows are too long." in found
    assert "prompt.cutoff: 10% of up dropped because the rows are too long." in found
    assert "rev:" not in found
    assert "of rev" not in found


def test_a_comparison_that_was_not_tuned_says_so(comparison):  # noqa: F811
    comparison["settings"] = {"learning_rate": 3e-4, "epochs": 3.0, "max_steps": None}
    found = [one for one in advise(comparison)["findings"] if one.startswith("Not tuned")]
    assert len(found) == 1
    assert "(0.0003)" in found[0]
    assert "Compare with --tune auto" in found[0]
    assert found[0].endswith("(requires validation rows: --split.validation=0.1).")
    comparison["data"] = {"up": {"train": {"rows": 90}, "validation": {"rows": 10}}}
    assert "validation" not in next(one for one in advise(comparison)["findings"] if "--tune" in one)
    comparison["rows"][0]["overrides"] = {"training.learning_rate": 1e-3}
    [found] = [one for one in advise(comparison)["findings"] if one.startswith("Not tuned")]
    assert found.startswith("Not tuned: ALoRA and HydraLoRA ran at the recipe's learning rate (0.0003)")
    for one in comparison["rows"]:
        one["overrides"] = {"training.learning_rate": 1e-3}
    assert not any(one.startswith("Not tuned") for one in advise(comparison)["findings"])
    for one in comparison["rows"]:
        one["overrides"] = {}
        one["tuning"] = [{"values": {"training.learning_rate": 1e-3}, "validation_loss": summary([0.5])}]
    assert not any(one.startswith("Not tuned") for one in advise(comparison)["findings"])


def test_a_collapsed_method_is_not_taken(comparison):  # noqa: F811
    comparison["rows"][1]["collapsed"] = [1]
    comparison["rows"][1]["difference"]["judged"] = False
    advice = advise(comparison)
    assert advice["choice"] == "lora"
    for one in comparison["rows"]:
        one["collapsed"] = [0]
    assert advise(comparison)["choice"] is None


def test_a_method_beside_which_all_others_collapsed_is_taken_and_the_reason_is_said(comparison):  # noqa: F811
    comparison["rows"] = comparison["rows"][:2]
    comparison["rows"][1]["collapsed"] = [1]
    comparison["rows"][1]["difference"]["judged"] = False
    advice = advise(comparison)
    assert advice["choice"] == "lora"
    assert advice["what"] == "Use LoRA (52.0 ± 2.0): ALoRA had a run that collapsed."
    assert "no baseline" not in advice["sure"]  # LoRA is the baseline, with the same seeds and rows


def test_one_method_alone_is_not_recommended_over_anything(comparison):  # noqa: F811
    comparison["rows"] = comparison["rows"][:1]
    advice = advise(comparison)
    assert advice["what"] == "LoRA scores 52.0 ± 2.0; there was no other method to compare it with."
    assert not any(one.startswith("Not tuned") for one in advice["findings"])


def test_the_run_to_ship_is_chosen_by_validation_loss_and_never_by_test_score():
    one = row("lora", "LoRA", [10.0, 90.0, 50.0])
    assert run_to_ship(one) == "cells/lora-seed0"
    one["validation_losses"] = [0.5, 0.4, 0.3]
    assert run_to_ship(one) == "cells/lora-seed2"
    one["collapsed"] = [2]
    assert run_to_ship(one) == "cells/lora-seed1"


def test_best_run_reads_the_advice_or_makes_it(comparison, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="--best takes the directory of a comparison"):
        best_run(tmp_path)
    (tmp_path / "cells").mkdir()
    with pytest.raises(CheckpointError, match="this comparison is not finished"):
        best_run(tmp_path)
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    run, advice = best_run(tmp_path)
    assert run == tmp_path / "cells" / "alora-seed0"
    assert advice["choice"] == "alora"
    comparison["majority"] = {"tasks": {"up": 43.0, "rev": 63.0}, "mean": 53.0}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    run, advice = best_run(tmp_path)
    assert (run, advice["undecided"]) == (tmp_path / "cells" / "lora-seed0", True)
    comparison["majority"] = {"tasks": {"up": 99.0, "rev": 99.0}, "mean": 99.0}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    with pytest.raises(ConfigError, match=r"recommends no method\. Nothing was learned"):
        best_run(tmp_path)


def test_export_says_on_stderr_that_the_verdict_is_undecided(comparison, tmp_path, monkeypatch, capsys):  # noqa: F811
    from braidlora.cli import main

    def export(target, output, **options):
        return {
            "form": "merged",
            "directory": str(output),
            "source": {"what": str(target)},
            "how": "",
            "cost": None,
            "exact": True,
        }

    monkeypatch.setattr("braidlora.export.run.export", export)
    comparison["majority"] = {"tasks": {"up": 43.0, "rev": 63.0}, "mean": 53.0}
    (tmp_path / "cells").mkdir()
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    assert main(["export", str(tmp_path), "--best"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("undecided: Too few test rows (100) to say")
    assert f"Exporting lora: {tmp_path / 'cells' / 'lora-seed0'}" in said

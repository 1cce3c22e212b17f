"""What the tables of a comparison say."""

from comparisons import comparison, statistic

from braidlora.reporting.comparison_tables import settings_table, summary_table, task_table, tuning_table
from braidlora.tables import TableCell


def cells(table, row):
    [found] = [line for line in table.rows if line.name == row]
    return dict(zip(table.columns[1:], map(as_cell, found.cells), strict=True))


def as_cell(cell):
    return cell if isinstance(cell, TableCell) else TableCell(cell)


def test_the_summary_has_a_line_per_method_and_one_per_reference():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    table = summary_table(given)
    assert [row.name for row in table.rows] == [
        "LoRA", "ALoRA", "Single-task LoRAs", "Base model, untrained", "Most frequent answer",
    ]  # fmt: skip
    assert [row.apart for row in table.rows] == [False, False, True, True, True]
    row = given["rows"][1]
    alora = cells(table, "ALoRA")
    assert alora["Mean score"].text == f"{row['mean']['mean']:.1f} ± {row['mean']['std_seeds']:.1f}"
    assert alora["Trained parameters"].text == "13,321"
    assert alora["Worst task"].detail in ("a", "b", "a\nb", "b\na")
    assert "Peak memory: the process's resident memory (VmHWM)." in table.notes
    assert cells(table, "LoRA")["Difference from LoRA [95% CI]"].text == "baseline"
    base = given["base"]["tasks"]
    assert cells(table, "Base model, untrained")["Worst task"].text == f"{min(base.values()):.1f}"


def test_a_value_is_marked_where_its_interval_leaves_out_zero():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    difference = given["rows"][1]["difference"]
    difference |= {"low": 0.1, "high": 9.0}
    difference["tasks"] = {
        "a": {"mean": -3.0, "low": -5.0, "high": -1.0},
        "b": {"mean": 0.0, "low": -1, "high": 1},
    }
    mean = cells(summary_table(given), "ALoRA")["Mean score"]
    assert (mean.mark, mean.best) == ("above", True)
    table = task_table(given)
    assert [cells(table, task)["ALoRA"].mark for task in ("a", "b")] == ["below", ""]
    assert any("significantly above or below LoRA" in note for note in table.notes)


def test_without_a_difference_nothing_is_marked_and_the_table_says_so():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    for interval in (given["rows"][1]["difference"], *given["rows"][1]["difference"]["tasks"].values()):
        interval |= {"low": -9.0, "high": 9.0}
    summary, tasks = summary_table(given), task_table(given)
    for row in (*summary.rows, *tasks.rows):
        assert not any(as_cell(cell).mark or as_cell(cell).best for cell in row.cells)
    assert tasks.notes == ["No method is significantly different from LoRA on any task."]
    assert not any("▲" in note for note in summary.notes)


def test_with_one_task_there_is_no_worst_task_and_no_word_of_single_tasks():
    given = comparison(["LoRA", "ALoRA"], ["a"], references=False)
    table = summary_table(given)
    assert "Worst task" not in table.columns
    assert {len(row.cells) for row in table.rows} == {len(table.columns) - 1}
    assert not any("Δm%" in note or "single-task" in note for note in table.notes)


def test_what_is_not_known_has_no_column_but_a_reason():
    given = comparison(["ALoRA"], ["a", "b"], [0], references=False, base=False)
    given["rows"][0]["peak_memory_mib"] = statistic([None])
    table = summary_table(given)
    assert table.columns == ["Method", "Mean score", "Worst task", "Trained parameters", "Seconds"]
    notes = " ".join(table.notes)
    assert "One seed only" in notes
    assert "Δm% is not available: --single-task was not given." in notes
    assert (
        "Base model, untrained: a classifier's head is new. Most frequent answer: no training rows." in notes
    )


def test_reasons_name_the_methods_they_hold_for():
    given = comparison(["LoRA", "ALoRA", "MoE-LoRA"], ["a"])
    for row in given["rows"][1:]:
        row |= {"difference": None, "difference_reason": "other seeds than the baseline"}
    given["rows"][0] |= {"delta_m": None, "delta_m_reason": "the reference of a is 0"}
    notes = summary_table(given).notes
    assert "Difference unknown for ALoRA and MoE-LoRA: other seeds than the baseline." in notes
    assert "Δm% unknown for LoRA: the reference of a is 0." in notes


def test_tasks_name_metric_and_rows_once_if_they_are_alike():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    assert task_table(given).caption == "Score on every task (exact_match, 100 test rows each)"
    given["tasks"]["b"] = {"metric": "rouge1", "n": 1}
    table = task_table(given)
    assert [row.detail for row in table.rows] == ["exact_match, 100 test rows", "rouge1, 1 test row"]


def test_a_task_that_a_method_was_not_scored_on_is_a_dash():
    given = comparison(["LoRA", "ALoRA"], ["a", "b"])
    del given["rows"][1]["tasks"]["b"], given["rows"][1]["difference"]["tasks"]["b"]
    assert cells(task_table(given), "b")["ALoRA"].text == "–"


def test_settings_are_written_as_on_the_command_line():
    given = comparison(["LoRA"], ["a"], [0, 1])
    given["rows"][0] |= {"overrides": {"adapter.method": {"peft_type": "LOHA"}, "adapter.use_rslora": True}}
    row = cells(settings_table(given), "LoRA")
    assert (
        row["Changes to the recipe"].text == 'adapter.method={"peft_type": "LOHA"}\nadapter.use_rslora=true'
    )
    assert row["Runs, relative to this page's folder"].text == "cells/method0-seed0\ncells/method0-seed1"


def test_tuning_shows_every_trial_and_marks_the_choice():
    given = comparison(["LoRA"], ["a"], tuned=True)
    given["rows"][0]["tuning"][2]["validation_loss"] = None
    table = tuning_table(given)
    assert [row.cells[::2] for row in table.rows] == [
        ["training.learning_rate=0.001", ""],
        ["training.learning_rate=0.005", "chosen"],
        ["training.learning_rate=0.02", ""],
    ]
    assert table.rows[2].cells[1] == "–"
    assert tuning_table(comparison(["LoRA"], ["a"])) is None

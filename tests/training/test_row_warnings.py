"""`train` itself says what is probably wrong with the rows, and the sizes of their parts; not only `preview` does."""

import json
import warnings

import pytest
import yaml

from braidlora.cli import main
from braidlora.errors import DataWarning


@pytest.fixture
def train(tmp_path, capsys):
    """Trains for a step; returns the exit code, what it prints, and errors with warnings."""

    def run(rows, test=None, task=None, **sections):
        names = {"train": rows} | ({"test": test} if test else {})
        for name, own in names.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        recipe = {
            "model": {"path": "embedded"},
            "adapter": {"r": 2, "target_modules": ["q_proj"]},
            "tasks": [
                {"name": "t", **{name: str(tmp_path / f"{name}.jsonl") for name in names}, **(task or {})}
            ],
            "prompt": {"cutoff": 48, "template": "{instruction} ="},
            "training": {"max_steps": 1, "batch_size": 4, "warmup_steps": 0, "threads": 1},
            "output": str(tmp_path / "run"),
            **sections,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            code = main(["train", str(tmp_path / "recipe.yaml"), "--no-report"])
        said = capsys.readouterr()
        return code, said.out, "\n".join([said.err, *(str(one.message) for one in caught)])

    return run


def labeled(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


SHORT = {"task": {"max_new_tokens": 2}}


def asked(count, words=2, answer="yes"):
    return [{"instruction": f"{number} " + "word " * words, "output": answer} for number in range(count)]


CLASSIFY = {"task": {"kind": "classify"}, "prompt": {"cutoff": 48}}


def test_a_label_that_training_never_saw(train, tmp_path):
    code, out, err = train(labeled(*"aabb"), labeled(*"abc"), **CLASSIFY)
    assert code == 0
    assert "t  4 train, 3 test rows" in out
    assert "1 of 3 test rows have a label that no training row has: 'c' (1)" in err
    assert "no training row has" in " ".join(
        json.loads((tmp_path / "run" / "data.json").read_text())["warnings"]
    )


def test_hundreds_of_one_off_labels_are_refused(train, tmp_path):
    code, _, err = train(labeled(*(f"answer {number}" for number in range(40))), **CLASSIFY)
    assert code == 3
    assert "40 training rows have 40 different labels, 40 of them only once" in err
    assert "holds answers rather than labels" in err
    assert not (tmp_path / "run").exists()


def test_a_metric_that_cannot_fit_is_refused(train):
    code, _, err = train(labeled(*"ab"), task={"kind": "classify", "metric": "rougeL"}, prompt={"cutoff": 48})
    assert code == 2
    assert "rougeL compares texts word by word" in err


def test_a_cutoff_that_cuts_rows_and_prompts(train):
    code, out, err = train(
        asked(12) + asked(4, words=40),
        asked(3, words=40),
        prompt={"cutoff": 24, "template": "{instruction} ="},
        **SHORT,
    )
    assert code == 0
    assert "task t, train: prompt.cutoff=24 is too short for its 16 rows: 4 cut" in err
    assert "task t, test: prompt.cutoff=24 is too short for the prompts of its 3 rows: 3 cut" in err
    assert "t  16 train, 3 test rows" in out


def test_one_file_is_divided_and_the_sizes_are_said(train):
    code, out, _ = train(asked(60), split={"validation": 0.1, "test": 0.2}, **SHORT)
    assert code == 0
    assert "t  60 rows: 42 train, 6 validation, 12 test (split holds out validation and test)" in out


@pytest.mark.parametrize(
    ("rows", "task", "says"),
    [
        (
            labeled("spam", "ham") * 8, {"kind": "classify", "metric": "f1", "positive": "Spam"},
            "tasks.t.positive: 'Spam' is not one of the task's labels 'ham', 'spam'. Write 'spam', in the same case.",
        ),
        (
            asked(16, answer="the correct answer is true"),
            {"extract": "boolq", "metric": "f1", "positive": "yes", "max_new_tokens": 2},
            "tasks.t.positive: 'yes' is not one of the task's labels 'true', 'false'.",
        ),
    ],
)  # fmt: skip
def test_a_positive_label_that_no_row_can_have_is_refused_before_training(rows, task, says, train, tmp_path):
    prompt = CLASSIFY["prompt"] if "text" in rows[0] else {"cutoff": 48, "template": "{instruction} ="}
    code, _, err = train(rows, rows[:4], task=task, prompt=prompt)
    assert code == 2
    assert says in err
    assert not (tmp_path / "run").exists()

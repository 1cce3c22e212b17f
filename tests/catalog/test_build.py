"""Files that are made from public ones: rows, order and columns, against small originals written here."""

import hashlib
import json
import random

import pytest

from braidlora import catalog
from braidlora.catalog._build import _ROWS, BUILDERS
from helpers.data import data_path


def lines(content):
    return [json.loads(line) for line in content.decode().splitlines()]


def test_a_set_with_a_test_part_keeps_it_and_loses_training_rows_that_are_in_it(tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("0 bad .\n1 good .\n4 superb\n2 so so\n", encoding="utf-8")
    test.write_text("3 good .\n", encoding="utf-8")
    inputs = {"train": train, "test": test}
    made = lines(BUILDERS["sentences"]("data/sentences/sst5/train.jsonl", inputs))
    assert made == [
        {"text": "bad .", "label": "very negative"},
        {"text": "superb", "label": "very positive"},
        {"text": "so so", "label": "neutral"},
    ]
    made = lines(BUILDERS["sentences"]("data/sentences/sst5/test.jsonl", {"test": test}))
    assert made == [{"text": "good .", "label": "positive"}]


def test_a_set_without_one_is_shuffled_and_divided_without_repeated_rows(tmp_path):
    original = tmp_path / "all"
    rows = [(str(number % 2), f"sentence {number}") for number in range(2000)]
    text = "".join(f"{label} {words}\n" for label, words in [*rows, *rows[:50]])
    original.write_bytes(text.encode() + b"1 caf\xe9\n")  # not UTF-8, as two of the sets
    train, test = (
        lines(BUILDERS["sentences"](f"data/sentences/mpqa/{part}.jsonl", {"all": original}))
        for part in ("train", "test")
    )
    assert (len(test), len(train)) == (1000, 1001)
    expected = [*rows, ("1", "caf\N{REPLACEMENT CHARACTER}")]
    random.Random(0).shuffle(expected)
    names = {"0": "negative", "1": "positive"}
    assert test + train == [{"text": text, "label": names[label]} for label, text in expected]


def test_induction_rows_are_those_of_the_list_with_all_right_answers(tmp_path):
    chosen = json.loads(_ROWS.read_text(encoding="utf-8"))["rhymes"]["test"]
    example = {"input": "cat", "output": "hat", "other_rhymes": ["bat", "cat", "hat", "mat"]}
    examples = {str(number): example | {"input": f"cat{number}"} for number in range(100)}
    examples["0"] = example
    original = tmp_path / "rhymes.json"
    original.write_text(json.dumps({"examples": examples}), encoding="utf-8")
    made = lines(BUILDERS["induction"]("data/induction/rhymes/test.jsonl", {"raw": original}))
    assert [row["input"] for row in made] == ["cat" if number == 0 else f"cat{number}" for number in chosen]
    assert made[chosen.index(0)] == {
        "instruction": "Give a word that rhymes.", "input": "cat", "output": "hat",
        "answers": ["hat", "bat", "mat"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["data/math/gsm8k/train.json", "data/math/mawps/train.json"])
def test_worked_problems_made_from_the_originals_are_the_recorded_files(name):
    file = catalog.data_file(name)
    inputs = {one: data_path(*one.split("/")) for one in file.inputs}
    made = BUILDERS[file.build](name, inputs)
    assert hashlib.sha256(made).hexdigest() == file.sha256
    assert made == data_path(*name.split("/")).read_bytes()

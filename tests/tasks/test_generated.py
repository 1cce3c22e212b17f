"""The generated suite: the same rows for the same seed, no overlap, and every answer right by a second reading."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from braidlora.errors import DataError
from braidlora.tasks.generated import KINDS, TASK_NAMES, generate_suite

KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
POSITIVE = {
    "good",
    "great",
    "lovely",
    "fine",
    "superb",
    "tasty",
    "kind",
    "clean",
    "bright",
    "charming",
    "fresh",
    "warm",
}


def answer(name: str, instruction: str) -> str:
    """What the answer has to be, read off the instruction's text alone."""
    words = instruction.split()
    listed = words[words.index(":") + 1 :] if ":" in words else []
    numbers = [int(word) for word in words if word.isdigit()]
    if name == "rising":
        return " ".join(str(n) for n in sorted(numbers))
    if name == "falling":
        return " ".join(str(-n) for n in sorted(-n for n in numbers))
    if name == "backwards":
        return " ".join(str(numbers[-1 - at]) for at in range(len(numbers)))
    if name == "count":
        kind = words[words.index("are") + 1]
        return str(Counter(KIND_OF[word] for word in listed)[kind])
    if name == "odd_one_out":
        counts = Counter(KIND_OF[word] for word in listed)
        (odd,) = [word for word in listed if counts[KIND_OF[word]] == 1]
        return odd
    if name == "who":
        colour = words[-2]
        (owner,) = re.findall(rf"the (\w+) has the {colour} box (?=[,.])", instruction)
        return owner
    if name == "mood":
        votes = set()
        for clause in instruction.split(" : ")[1].split(" and "):
            *_, last = clause.split()
            votes.add((last in POSITIVE) != (" not " in clause))
        assert len(votes) == 1, "the clauses of a review agree"
        return "positive" if votes.pop() else "negative"
    assert name == "sum"
    return str(sum(numbers))


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_answer_is_right(name, seed):
    task = generate_suite(seed, tasks=[name])[name]
    for row in task.train + task.test:
        assert row["output"] == answer(name, row["instruction"]), row
        assert task.options is None or row["output"] in task.options


@pytest.mark.parametrize("name", TASK_NAMES)
def test_sizes_are_as_asked_and_no_instruction_comes_twice(name):
    task = generate_suite(3, train_rows=120, test_rows=40, tasks=[name])[name]
    assert (len(task.train), len(task.test)) == (120, 40)
    assert len({row["instruction"] for row in task.train + task.test}) == 160


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_answer_is_so_frequent_that_guessing_pays(name):
    task = generate_suite(0, tasks=[name])[name]
    share = max(Counter(row["output"] for row in task.test).values()) / len(task.test)
    assert share <= (0.62 if name == "mood" else 0.4)


def test_some_tasks_give_different_answers_to_the_same_numbers():
    rows = {
        name: generate_suite(0, tasks=[name])[name].train[0] for name in ("rising", "falling", "backwards")
    }
    prompts = {row["instruction"].split(":")[0] for row in rows.values()}
    assert len(prompts) == 3
    assert all(prompt.startswith("put these in ") for prompt in prompts)


def test_rows_depend_on_the_seed_and_on_nothing_else():
    assert generate_suite(0) == generate_suite(0)
    assert generate_suite(0)["sum"] == generate_suite(0, tasks=["sum"])["sum"]
    assert generate_suite(0)["sum"].train != generate_suite(1)["sum"].train
    code = "from braidlora.tasks.generated import generate_suite; print(generate_suite(5))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_unknown_tasks_and_impossible_sizes_are_refused():
    with pytest.raises(DataError, match="unknown sorting; known are rising"):
        generate_suite(tasks=["sorting"])
    with pytest.raises(DataError, match="distinct instructions"):
        generate_suite(tasks=["sum"], train_rows=5000)

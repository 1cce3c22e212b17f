"""Eight generated instruction tasks over a small vocabulary of words and numbers, for the demo and the tests.

Some tasks are related (`count` and `odd_one_out` both need to know what an animal is) and some conflict (`rising`,
`falling` and `backwards` want three different answers to the same numbers, and their prompts differ in one word), so
it matters how a model shares what it learns. The seed determines every row; training and test instructions of a task
do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from braidlora.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "animals": tuple("cat dog cow fox hen owl bear goat wolf frog duck crab".split()),
    "fruits": tuple("pear plum fig apple grape kiwi mango melon cherry papaya guava berry".split()),
    "colours": tuple("red blue green black white brown pink grey gold purple violet yellow".split()),
    "tools": tuple("saw axe drill hammer spade rake knife brush needle shovel pliers ladder".split()),
}
PRAISE = tuple("good great lovely fine superb tasty kind clean bright charming fresh warm".split())
BLAME = tuple("bad awful dull poor stale rude dirty gloomy boring nasty sour broken".split())
THINGS = tuple("soup room film staff song garden story bread hotel music tea park".split())

Row = dict[str, str]


@dataclass(frozen=True)
class GeneratedTask:
    """One generated task.

    Attributes:
        train, test: rows with the keys `instruction` and `output`.
        options: the possible answers if there are few, otherwise None.
    """

    train: list[Row]
    test: list[Row]
    options: tuple[str, ...] | None


def _numbers(random: Random) -> list[int]:
    return random.sample(range(100), random.randint(3, 6))


def _ordered(word: str, order: Callable[[list[int]], list[int]]) -> Callable[[Random], tuple[str, str]]:
    def make(random: Random) -> tuple[str, str]:
        numbers = _numbers(random)
        return f"put these in {word} order : {_join(numbers)}", _join(order(numbers))

    return make


def _count(random: Random) -> tuple[str, str]:
    kind = random.choice(list(KINDS))
    others = [word for name, words in KINDS.items() if name != kind for word in words]
    wanted = random.randint(0, 4)
    words = random.sample(KINDS[kind], wanted) + random.sample(others, random.randint(1, 6 - wanted))
    random.shuffle(words)
    return f"how many of these are {kind} : {_join(words)}", str(wanted)


def _odd_one_out(random: Random) -> tuple[str, str]:
    kind, other = random.sample(list(KINDS), 2)
    odd = random.choice(KINDS[other])
    words = [*random.sample(KINDS[kind], random.randint(2, 4)), odd]
    random.shuffle(words)
    return f"which one does not belong : {_join(words)}", odd


def _who(random: Random) -> tuple[str, str]:
    count = random.randint(2, 3)
    owners = random.sample(KINDS["animals"], count)
    colours = random.sample(KINDS["colours"], count)
    facts = " , ".join(
        f"the {owner} has the {colour} box" for owner, colour in zip(owners, colours, strict=True)
    )
    asked = random.randrange(count)
    return f"{facts} . who has the {colours[asked]} box", owners[asked]


def _mood(random: Random) -> tuple[str, str]:
    positive = random.random() < 0.5
    clauses = []
    for thing in random.sample(THINGS, random.randint(1, 2)):
        negated = random.random() < 0.4
        adjective = random.choice(PRAISE if positive != negated else BLAME)
        clauses.append(f"the {thing} was {'not ' if negated else ''}{adjective}")
    return f"is this review positive or negative : {' and '.join(clauses)}", (
        "positive" if positive else "negative"
    )


def _sum(random: Random) -> tuple[str, str]:
    left, right = random.randint(1, 40), random.randint(1, 40)
    return f"what do you get when you put {left} and {right} together", str(left + right)


def _join(items: Sequence[object]) -> str:
    return " ".join(map(str, items))


_TASKS: dict[str, tuple[Callable[[Random], tuple[str, str]], tuple[str, ...] | None]] = {
    "rising": (_ordered("rising", sorted), None),  # sort three to six numbers, smallest first
    "falling": (_ordered("falling", lambda n: sorted(n)[::-1]), None),
    "backwards": (_ordered("backward", lambda n: n[::-1]), None),  # repeat numbers from the last to the first
    "count": (_count, ("0", "1", "2", "3", "4")),  # the words of one kind in a mixed list
    "odd_one_out": (_odd_one_out, None),  # the word that is of a different kind than the others
    "who": (_who, KINDS["animals"]),  # which of two or three owners has a box, by stated facts
    "mood": (_mood, ("positive", "negative")),  # of a review; some contain negations
    "sum": (_sum, None),  # of two numbers up to forty
}

TASK_NAMES: tuple[str, ...] = tuple(_TASKS)


def generate_suite(
    seed: int = 0, train_rows: int = 300, test_rows: int = 100, tasks: Sequence[str] | None = None
) -> dict[str, GeneratedTask]:
    """Generate all tasks or the named ones.

    Args:
        seed: determines the rows of a task, whichever other tasks are generated.
        train_rows, test_rows: rows per task.
        tasks: names from `TASK_NAMES`; None for all eight.

    Raises:
        DataError: a task is unknown, or has fewer distinct instructions than rows are requested.
    """
    names = TASK_NAMES if tasks is None else tasks
    unknown = [name for name in names if name not in _TASKS]
    if unknown:
        raise DataError(f"generated tasks: unknown {', '.join(unknown)}; known are {', '.join(TASK_NAMES)}.")
    return {name: _generate(name, seed, train_rows, test_rows) for name in names}


def _generate(name: str, seed: int, train_rows: int, test_rows: int) -> GeneratedTask:
    make, options = _TASKS[name]
    random = Random(f"braidlora/{name}/{seed}")
    rows: dict[str, str] = {}
    repeats = 0
    while len(rows) < train_rows + test_rows:
        instruction, output = make(random)
        repeats = repeats + 1 if instruction in rows else 0
        if repeats > 1000:
            raise DataError(
                f"generated task {name}: got {train_rows} training + {test_rows} test rows, but the task has only "
                f"about {len(rows)} distinct instructions. Set a lower `limit`."
            )
        rows[instruction] = output
    made = [{"instruction": instruction, "output": output} for instruction, output in rows.items()]
    return GeneratedTask(made[:train_rows], made[train_rows:], options)

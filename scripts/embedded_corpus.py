"""Pretraining corpus of the embedded base model: generated lines in a terse notation, unlike the demo tasks' wording.

Each line applies one operation to a list, a set of facts or a sentence: `sort 3 9 5 = 3 5 9`. The demo's instructions
ask for the same abilities in other words and another layout that the base model has never seen; an adapter has to teach
it. Some plain sentences give every word of the vocabulary a context.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from braidlora.tasks.generated import BLAME, KINDS, PRAISE, THINGS

WORDS = tuple(word for words in KINDS.values() for word in words)
# Words that only the demo's instructions use; the pretraining text has them only in shuffled sentences.
INSTRUCTION_WORDS = tuple(
    "put these in rising falling backward order how many of are animals fruits colours tools which one does not belong "
    "the has box who was and is this review positive or negative what do you get when together : , .".split()
)
MARKERS = ("=", "->", "gives")


def _list(random: Random, longest: int = 7) -> list[str]:
    pool = [str(n) for n in range(100)] if random.random() < 0.6 else list(WORDS)
    return random.sample(pool, random.randint(2, longest))


def _numbers(random: Random, longest: int = 7) -> list[int]:
    return random.sample(range(100), random.randint(2, longest))


def _sort(random: Random) -> tuple[str, list[str], list[str]]:
    numbers = _numbers(random)
    return "sort", [str(n) for n in numbers], [str(n) for n in sorted(numbers)]


def _sort_down(random: Random) -> tuple[str, list[str], list[str]]:
    numbers = _numbers(random)
    return "drop", [str(n) for n in numbers], [str(n) for n in sorted(numbers, reverse=True)]


def _flip(random: Random) -> tuple[str, list[str], list[str]]:
    items = _list(random)
    return "flip", items, items[::-1]


def _copy(random: Random) -> tuple[str, list[str], list[str]]:
    items = _list(random)
    return "copy", items, items


def _least(random: Random) -> tuple[str, list[str], list[str]]:
    numbers = _numbers(random)
    return "least", [str(n) for n in numbers], [str(min(numbers))]


def _most(random: Random) -> tuple[str, list[str], list[str]]:
    numbers = _numbers(random)
    return "most", [str(n) for n in numbers], [str(max(numbers))]


def _tally(random: Random) -> tuple[str, list[str], list[str]]:
    kind = random.choice(list(KINDS))
    others = [word for name, words in KINDS.items() if name != kind for word in words]
    wanted = random.randint(0, 5)
    words = random.sample(KINDS[kind], wanted) + random.sample(
        others, random.randint(max(0, 2 - wanted), 6 - wanted)
    )
    random.shuffle(words)
    return f"tally {kind[:-1]}", words, [str(wanted)]


def _kind(random: Random) -> tuple[str, list[str], list[str]]:
    kind = random.choice(list(KINDS))
    return "class", [random.choice(KINDS[kind])], [kind[:-1]]


def _same(random: Random) -> tuple[str, list[str], list[str]]:
    left, right = random.choice(list(KINDS)), random.choice(list(KINDS))
    pair = [random.choice(KINDS[left]), random.choice(KINDS[right])]
    return "alike", pair, ["yes" if left == right else "no"]


def _stray(random: Random) -> tuple[str, list[str], list[str]]:
    kind, other = random.sample(list(KINDS), 2)
    odd = random.choice(KINDS[other])
    words = [*random.sample(KINDS[kind], random.randint(2, 5)), odd]
    random.shuffle(words)
    return "stray", words, [odd]


def _pairs(random: Random) -> tuple[str, list[str], list[str]]:
    count = random.randint(2, 4)
    keys, values = random.sample(WORDS, count), random.sample(WORDS, count)
    asked = random.randrange(count)
    facts = [word for key, value in zip(keys, values, strict=True) for word in (key, value, ";")]
    if random.random() < 0.5:
        return "value", [*facts, keys[asked]], [values[asked]]
    return "key", [*facts, values[asked]], [keys[asked]]


def _tone(random: Random) -> tuple[str, list[str], list[str]]:
    good = random.random() < 0.5
    words: list[str] = []
    for thing in random.sample(THINGS, random.randint(1, 3)):
        negated = random.random() < 0.4
        adjective = random.choice(PRAISE if good != negated else BLAME)
        words += [thing, *(["not"] if negated else []), adjective]
    return "tone", words, ["up" if good else "down"]


def _add(random: Random) -> tuple[str, list[str], list[str]]:
    left, right = random.randint(0, 49), random.randint(0, 49)
    return "add", [str(left), str(right)], [str(left + right)]


def _next(random: Random) -> tuple[str, list[str], list[str]]:
    start = random.randint(0, 95)
    return "next", [str(start)], [str(start + step) for step in range(1, random.randint(2, 5))]


OPERATIONS: dict[str, tuple[float, Callable[[Random], tuple[str, list[str], list[str]]]]] = {
    "sort": (3.0, _sort),
    "drop": (3.0, _sort_down),
    "flip": (2.0, _flip),
    "copy": (1.5, _copy),
    "least": (0.7, _least),
    "most": (0.7, _most),
    "tally": (2.5, _tally),
    "class": (0.5, _kind),
    "alike": (0.7, _same),
    "stray": (2.0, _stray),
    "pairs": (3.0, _pairs),
    "tone": (1.5, _tone),
    "add": (4.0, _add),
    "next": (0.7, _next),
}


def operation_line(random: Random, name: str) -> tuple[str, str]:
    """(prompt, answer) of one operation; the operation's name precedes or follows its argument."""
    word, items, answer = OPERATIONS[name][1](random)
    filler = random.sample(INSTRUCTION_WORDS, random.randint(1, 5)) if random.random() < 0.3 else []
    head, tail = ([word, *filler], []) if random.random() < 0.7 else (filler, [word])
    return " ".join([*head, *items, *tail, random.choice(MARKERS)]), " ".join(answer)


def sentence(random: Random) -> str:
    """A plain sentence that gives the demo's instruction words a context, but no task."""
    words = random.sample(INSTRUCTION_WORDS, random.randint(3, 8)) + random.sample(WORDS + THINGS, 2)
    random.shuffle(words)
    return " ".join(words)


def line(random: Random) -> tuple[str, str]:
    """One line of the corpus as (prompt, answer); a sentence has an empty prompt."""
    if random.random() < 0.04:
        return "", sentence(random)
    names, weights = list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()]
    return operation_line(random, random.choices(names, weights)[0])


def vocabulary() -> list[str]:
    """All words of the vocabulary, each a single token."""
    random = Random(0)
    words = {str(n) for n in range(100)}
    for name in OPERATIONS:
        for _ in range(2000):
            prompt, answer = operation_line(random, name)
            words.update(prompt.split(), answer.split())
    words.update(INSTRUCTION_WORDS, WORDS, THINGS, PRAISE, BLAME)
    return sorted(words)

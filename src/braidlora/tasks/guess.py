"""What a data file is for: its task, its columns, and what is a guess. No torch here.

`braidlora init` writes a recipe from these guesses and shows them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from braidlora.config import DataSource
from braidlora.errors import DataError
from braidlora.tasks.read import describe, read_rows

Kind = Literal["classify", "generate", "chat"]
_ROWS = 2000  # of a file that are looked at
_MOST_LABELS = 100
_PER_LABEL = 3  # rows that a label needs on average, for a column to be labels and not answers
_LABEL_LENGTH = 60  # characters
# Usual names of columns; the first that a file has counts.
_CHATS = ("messages", "conversations")
_INSTRUCTIONS = ("instruction", "prompt", "question", "query", "request", "problem")
_INPUTS = ("input", "context", "passage")
_OUTPUTS = (
    "output",
    "response",
    "completion",
    "answer",
    "reply",
    "solution",
    "target",
    "summary",
    "translation",
)
_LABELS = (
    "label", "labels", "class", "category", "intent", "topic", "sentiment", "queue", "tag", "type", "target", "stars",
    "rating",
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "message", "review", "comment", "body", "content", "document", "utterance", "description",
    "title", "question", "input",
)  # fmt: skip
_PARTS = {
    "train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test", "dev": "validation",
    "valid": "validation", "validation": "validation", "val": "validation",
}  # fmt: skip
_WITH_CHATS = ("system", "tools", "functions")
FIELDS: Mapping[Kind, Sequence[str]] = {
    "classify": ("text", "label"),
    "generate": ("instruction", "input", "output"),
    "chat": ("messages",),
}
_PREFERENCES = {"chosen", "rejected"}
_JUDGED = {"completion", "label"}


@dataclass(frozen=True)
class Guess:
    """What one file is.

    Attributes:
        path: as given.
        name: of the task that it belongs to.
        part: train, validation or test.
        kind: labels to classify, answers to generate, or chats.
        columns: the recipe's `columns`: by field, where the names differ.
        rows: that were read.
        labels: of a label task, with their number of rows, the most frequent first.
        there: all columns of the file.
        longest: characters of the longest row in a hundred, over the fields that are used.
        unsure: what a reader should check, in words.
        unused: columns that the recipe leaves out.
        notes: what could be done otherwise, in words.
        read_as: how a table was read, such as its delimiter and encoding.
        brief: whether every answer to generate has one or two words, so that it is right or wrong as a whole.
    """

    path: str
    name: str
    part: Literal["train", "validation", "test"]
    kind: Kind
    columns: dict[str, str]
    rows: int
    labels: dict[str, int]
    there: list[str]
    longest: int
    unsure: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read_as: str | None = None
    brief: bool = False

    def column(self, name: str) -> str:
        """The file's column for a field."""
        return self.columns.get(name, name)


def guess_file(path: str, given: Mapping[str, str] | None = None) -> Guess:
    """Read a file's first rows, and guess what it is for.

    Args:
        path: of a json, jsonl, csv or parquet file.
        given: columns by field that the user named; they are not guessed.

    Raises:
        DataError: it cannot be read, has no rows, or has no columns that could be used.
    """
    guess = _guess_file(path, given)
    return replace(guess, read_as=describe(DataSource(source=path)), unused=_unused(guess))


def like(path: str, other: Guess) -> Guess:
    """Read a file as another part of the same task: with the columns of its training rows."""
    fields = () if other.kind == "chat" else FIELDS[other.kind]
    return guess_file(path, columns_of(other, fields))


def columns_of(guess: Guess, fields: Sequence[str]) -> dict[str, str]:
    """The file's column of each field that it has; a column that is named for one field feeds no other."""
    named = set(guess.columns.values())
    return {
        field: guess.column(field)
        for field in fields
        if guess.column(field) in guess.there and (field in guess.columns or field not in named)
    }


def _unused(guess: Guess) -> list[str]:
    used = {*columns_of(guess, FIELDS[guess.kind]).values(), *guess.columns.values()}
    if guess.kind == "chat":
        used |= {name for name in guess.there if name.lower().strip() in (*_CHATS, *_WITH_CHATS)}
    if guess.kind == "generate":
        used.add("answer")  # read where the file has it
    return [name for name in guess.there if name not in used]


def _guess_file(path: str, given: Mapping[str, str] | None) -> Guess:
    read = list(islice(read_rows(DataSource(source=path), "train"), _ROWS))
    rows = [row.columns for row in read if row.problem is None]
    if not rows:
        problem = f": {read[0].place}: {read[0].problem}" if read else ""
        raise DataError(f"{path}: no readable rows{problem}.")
    there = list(dict.fromkeys(str(name) for row in rows for name in row))
    lower = {name.lower().strip(): name for name in reversed(there)}
    if lower.keys() >= _PREFERENCES and not given:
        raise DataError(
            f"{path}: has the columns `chosen` and `rejected`, so it is for preference training (DPO), which braidlora "
            "does not support; TRL's DPOTrainer does. To train on the chosen answers alone, give --columns "
            "output=chosen."
        )
    judged = lower.keys() >= _JUDGED and all(isinstance(row.get(lower["label"]), bool) for row in rows)
    if judged and not given:
        raise DataError(
            f"{path}: has a `completion` with a true or false `label`, so it is for preference training (KTO), which "
            "braidlora does not support; TRL's KTOTrainer does. To train on the good completions alone, give "
            "--columns output=completion,instruction=prompt, and set where: {label: true} in the recipe."
        )
    name, part = _name_and_part(path)
    chat = next((lower[one] for one in _CHATS if one in lower), None)
    if chat is not None and not given:
        guess = Guess(path, name, part, "chat", {}, len(rows), {}, there, 0)
        return replace(guess, longest=_longest(rows, [chat]))
    if given:
        return _as_given(Guess(path, name, part, "generate", dict(given), len(rows), {}, there, 0), rows)
    return _guess_columns(Guess(path, name, part, "generate", {}, len(rows), {}, there, 0), rows, lower)


def _as_given(guess: Guess, rows: Sequence[Mapping[str, Any]]) -> Guess:
    unknown = [column for column in guess.columns.values() if column not in guess.there]
    if unknown:
        raise DataError(f"{guess.path}: no column {unknown[0]!r}; its columns are {', '.join(guess.there)}.")
    kind: Kind = "classify" if "label" in guess.columns else "generate"
    if "messages" in guess.columns:
        kind = "chat"
    used = list(guess.columns.values())
    labels = _labels(rows, guess.column("label")) if kind == "classify" else {}
    kept = {name: column for name, column in guess.columns.items() if name != column}
    brief = kind == "generate" and _brief(rows, guess.column("output"))
    return replace(guess, kind=kind, columns=kept, labels=labels, longest=_longest(rows, used), brief=brief)


def _guess_columns(guess: Guess, rows: Sequence[Mapping[str, Any]], lower: Mapping[str, str]) -> Guess:
    texts = [name for name in guess.there if _is_text(rows, name)]
    question = next((lower[one] for one in _INSTRUCTIONS if one in lower), None)
    answer = next((lower[one] for one in _OUTPUTS if one in lower and lower[one] != question), None)
    label = next((lower[one] for one in _LABELS if one in lower), None)
    more = next((lower[one] for one in _INPUTS if one in lower and lower[one] != question), None)
    if question is not None and more is not None and (answer or label) is not None:
        # A label task reads one text, and would lose one of the two.
        answer = answer or str(label)
        guess = replace(guess, notes=_few_answers(rows, answer))
        return _generate(guess, rows, {"instruction": question, "output": answer, "input": more}, [])
    if question is not None and answer is not None and (label is None or label == answer):
        if not _few_labels(rows, answer):
            return _generate(guess, rows, {"instruction": question, "output": answer}, [])
        label = answer
    text = next((lower[one] for one in _TEXTS if one in lower and lower[one] != label), None)
    if label is not None and not _few_labels(rows, label):
        label = None
    unsure = []
    if label is None:
        candidates = [name for name in guess.there if name != text and _few_labels(rows, name)]
        if candidates:
            label = min(candidates, key=lambda name: len(_labels(rows, name)))
            unsure.append(f"{label!r} is used as the label, because it has few different values")
    others = [name for name in texts if name != label]
    if text is None and others:
        text = question or max(others, key=lambda name: _mean_length(rows, name))
        if text != question:
            unsure.append(f"{text!r} is used as the text, because it is the longest")
    if label is not None and text is not None:
        columns = {"text": text, "label": label}
        kept = {name: column for name, column in columns.items() if name != column}
        return replace(
            guess,
            kind="classify",
            columns=kept,
            labels=_labels(rows, label),
            longest=_longest(rows, [text]),
            unsure=unsure,
        )
    if len(others) >= 2:
        question = question or others[0]
        answer = answer or next(name for name in reversed(others) if name != question)
        why = f"{question!r} is used as the question and {answer!r} as the answer, by their position"
        return _generate(guess, rows, {"instruction": question, "output": answer}, [why])
    raise DataError(
        f"{guess.path}: no task can be detected from its columns ({', '.join(guess.there)}). A label task needs a text "
        "and a label, others an instruction and an output, a chat `messages`. Name them: --columns text=A,label=B or "
        "--columns instruction=A,output=B."
    )


def _generate(
    guess: Guess, rows: Sequence[Mapping[str, Any]], columns: dict[str, str], unsure: list[str]
) -> Guess:
    kept = {name: column for name, column in columns.items() if name != column}
    longest = _longest(rows, list(columns.values()))
    brief = _brief(rows, columns["output"])
    return replace(guess, kind="generate", columns=kept, longest=longest, unsure=unsure, brief=brief)


def _brief(rows: Sequence[Mapping[str, Any]], answer: str) -> bool:
    """Whether all answers have one or two words; scripts without spaces between words are judged by length."""
    values = [str(row[answer]) for row in rows if row.get(answer) not in (None, "")]
    return bool(values) and all(len(text.split()) <= 2 and len(text) <= _LABEL_LENGTH for text in values)


def _few_answers(rows: Sequence[Mapping[str, Any]], answer: str) -> list[str]:
    if not _few_labels(rows, answer):
        return []
    count = len(_labels(rows, answer))
    return [
        f"{answer!r} has only {count} different values; with `options: [...]` and `mode: rank` in its task the model "
        "chooses one of them instead of generating text"
    ]


def _is_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) not in (None, "")]
    return bool(values) and all(isinstance(value, str) for value in values)


def _labels(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    values = (str(row[name]) for row in rows if row.get(name) not in (None, ""))
    return dict(Counter(values).most_common())


def _few_labels(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a column has so few, short and repeated values that they are labels."""
    if any(isinstance(row.get(name), list | dict | float) for row in rows):
        return False
    found = _labels(rows, name)
    most = min(_MOST_LABELS, sum(found.values()) // _PER_LABEL)
    return 2 <= len(found) <= max(2, most) and max(map(len, found)) <= _LABEL_LENGTH


def _mean_length(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(len(str(row.get(name) or "")) for row in rows) / len(rows)


def _longest(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    """Characters of the row that one in a hundred is longer than."""
    lengths = sorted(sum(len(str(row.get(name) or "")) for name in names) for row in rows)
    return lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]


def _name_and_part(path: str) -> tuple[str, Literal["train", "validation", "test"]]:
    """The task and the part that a file's name says: `snli-test.jsonl` is the test part of `snli`."""
    stem = Path(path).name.split(".")[0]
    words = [word for word in re.split(r"[-_ ]+", stem) if word]
    part: Any = next((_PARTS[word.lower()] for word in reversed(words) if word.lower() in _PARTS), "train")
    rest = [word for word in words if word.lower() not in _PARTS]
    name = "_".join(rest) or Path(path).resolve().parent.name or "task"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "task", part

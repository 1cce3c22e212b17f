"""A task and its row counts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from braidlora.tasks.templates import Template

Row = dict[str, Any]
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class BadRow(Exception):  # noqa: N818 (internal: becomes a DataError or a count)
    """Why a row cannot be used."""


class WrongColumns(BadRow):
    """Why a row cannot be used: it has other columns than expected, as probably all rows of its source."""


@dataclass(frozen=True)
class RawRow:
    """One row of a source: its columns, or the problem that makes it unreadable."""

    place: str
    columns: dict[str, Any]
    problem: str | None = None


class ChatRow(Row):
    """A row of messages; `place` is where it was read (`rows.jsonl:12`), for messages about its rendering."""

    place: str = ""


@dataclass
class Counts:
    """How many rows of one part of a task were read, and what happened to them, in the order of the steps.

    `read = filtered + skipped + not_drawn + kept + cut`: rows excluded by `where`, bad rows skipped by
    `prompt.bad_rows: skip` (with the first few reasons in `problems`), rows that `limit` did not draw, rows kept, and
    rows that `split` moved to another part; `held_out` marks the part that they were moved to. `read_as` says how a
    table was read (delimiter and encoding).
    """

    read: int = 0
    filtered: int = 0
    skipped: int = 0
    not_drawn: int = 0
    cut: int = 0
    kept: int = 0
    held_out: bool = False
    read_as: str | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A task with all its rows in memory.

    A row of a `generate` task has `instruction`, `input` ("" if there is none), `output` (the training target) and
    `answer` (the reference for scoring: a text, or a list of several right answers), or, where rows are chats,
    `messages`, `tools` (if there are any), and the last assistant turn as `output` and `answer`; a row of a `classify`
    task has `text` and `label`. `option_texts` are the options as answers, if they are known without training rows.
    `mode` is how a language model answers test rows, if not as evaluation.mode says; `positive` is the label of
    `metric: f1`.
    """

    name: str
    kind: Literal["generate", "classify"]
    template: Template
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    metric: str
    extract: str = "none"
    options: list[str] | None = None
    max_new_tokens: int | None = None
    labels: list[str] | None = None
    option_texts: list[str] | None = None
    mode: Literal["generate", "rank"] | None = None
    positive: str | None = None
    counts: Mapping[Part, Counts] = field(default_factory=dict)

    def rows(self, part: Part) -> list[Row]:
        """The rows of `train`, `validation` or `test`."""
        return getattr(self, part)

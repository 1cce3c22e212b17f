"""Turn the columns of a source into the fields of a row: mapping, filters, and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from unicodedata import normalize

from braidlora.answers import plain_answer
from braidlora.config import TaskSection
from braidlora.tasks._task import BadRow, ChatRow, Part, Row, WrongColumns
from braidlora.tasks.columns import missing_column
from braidlora.tasks.messages import find_chat, last_answer, read_chat
from braidlora.tasks.preferences import refuse_preferences
from braidlora.tasks.read import RawRow

__all__ = ["BadRow", "column_text", "matches", "to_row"]


def matches(columns: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether every column in `where` equals its value, or one of the values in a list.

    Numbers and booleans also equal their text, because CSV has only text.
    """
    for column, wanted in where.items():
        if column not in columns:
            return False
        value = columns[column]
        choices = wanted if isinstance(wanted, list) else [wanted]
        if not any(_same(value, choice) for choice in choices):
            return False
    return True


def _same(value: Any, choice: Any) -> bool:
    if isinstance(value, bool) or isinstance(choice, bool):
        return str(value).lower() == str(choice).lower()
    return bool(value == choice) or (not isinstance(value, list | dict) and str(value) == str(choice))


def to_row(raw: RawRow, task: TaskSection, part: Part) -> Row:
    """The fields of a row of this task, as text.

    A row with `messages` or `conversations` is a chat, see `messages`. Of any other row of a `generate` task, a missing
    `input` is "" (and so may be `instruction`, if there is an input). `answer` (the reference for scoring)
    defaults to `output`; a test row may have only an `answer`. Its column may hold a list of right answers.

    Raises:
        BadRow: a field is missing, null, empty, or not text.
    """
    if raw.problem is not None:
        raise BadRow(raw.problem)
    if task.kind == "classify":
        refuse_preferences(raw.columns, task.columns)
        row: Row = {name: _required(raw.columns, task, name) for name in ("text", "label")}
        row["label"] = normalize("NFC", row["label"])  # composed and decomposed accents are the same label
        if task.options is not None:
            same = [option for option in task.options if normalize("NFC", option) == row["label"]]
            if not same:
                raise BadRow(
                    f"the label {row['label']!r} is not one of the task's options: {', '.join(task.options)}"
                )
            row["label"] = same[0]
        return row
    chat_column = find_chat(raw.columns, task.columns)
    if chat_column is not None:
        return _chat(raw, task, chat_column)
    refuse_preferences(raw.columns, task.columns)
    instruction, given_input = (
        _optional(raw.columns, task, "instruction"),
        _optional(raw.columns, task, "input"),
    )
    answer, output = _answers(raw.columns, task), _optional(raw.columns, task, "output")
    row = {"instruction": instruction or "", "input": given_input or ""}
    if not (row["instruction"] + row["input"]).strip():
        row["instruction"] = _required(raw.columns, task, "instruction")
    row["output"] = (
        (output or answer[0]) if part == "test" and answer else _required(raw.columns, task, "output")
    )
    row["answer"] = answer if len(answer) > 1 else answer[0] if answer else row["output"]
    _check_options(row, answer, task)
    return row


def _chat(raw: RawRow, task: TaskSection, column: str) -> Row:
    if column not in raw.columns:
        raise WrongColumns(missing_column(raw.columns, column, task.name, "messages"))
    row = ChatRow(read_chat(raw.columns, column, task.columns.get("tools")))
    row.place = raw.place
    row["output"] = last_answer(row["messages"], column)
    answer = _answers(raw.columns, task) if "answer" in task.columns else []
    row["answer"] = answer if len(answer) > 1 else answer[0] if answer else row["output"]
    _check_options(row, answer, task)
    return row


def _check_options(row: Row, answer: list[str], task: TaskSection) -> None:
    """Raise BadRow if a row has no option: neither its output nor, which is what counts, its reference.

    With an extractor the reference is what is extracted from the answer, so the output may have the option instead.
    """
    if task.options is None:
        return
    options = {normalize("NFC", option) for option in task.options}
    if not options & {normalize("NFC", text) for text in (row["output"], *answer)}:
        raise BadRow(
            f"the answer {row['answer']!r} is not one of the task's options: {', '.join(task.options)}"
        )
    if (
        task.extract == "none"
        and answer
        and not set(map(plain_answer, options)) & set(map(plain_answer, answer))
    ):
        if "messages" in row:
            remedy = "Leave out columns.answer, and the last answer of the chat counts"
        else:
            remedy = f"To score against the output, set columns.answer={task.columns.get('output', 'output')}"
        raise BadRow(
            f"the column {task.columns.get('answer', 'answer')!r}, which a prediction is scored against, has "
            f"{row['answer']!r}, which is not one of the task's options: {', '.join(task.options)}; the row's output "
            f"{row['output']!r} is one. {remedy}"
        )


def column_text(raw: RawRow, column: str) -> str:
    """A column of a row as text.

    Raises:
        BadRow: the column does not exist, or is null.
    """
    if column not in raw.columns:
        raise BadRow(f"no column {column!r} (the columns are {', '.join(map(str, raw.columns)) or 'none'})")
    value = _as_text(raw.columns[column], column)
    if value is None:
        raise BadRow(f"the column {column!r} is null")
    return value


def _required(columns: Mapping[str, Any], task: TaskSection, name: str) -> str:
    column = task.columns.get(name, name)  # type: ignore[call-overload]
    if column not in columns:
        raise WrongColumns(missing_column(columns, column, task.name, name))
    value = _as_text(columns[column], column)
    if value is None or not value.strip():
        raise BadRow(f"the column {column!r} (`{name}`) is {'null' if value is None else 'empty'}")
    return value


def _optional(columns: Mapping[str, Any], task: TaskSection, name: str) -> str | None:
    if name in ("instruction", "input") and name not in task.columns and name in task.columns.values():
        return None  # the column of this name is the recipe's column of another field
    column = task.columns.get(name, name)  # type: ignore[call-overload]
    if column not in columns:
        if name in task.columns:
            raise WrongColumns(missing_column(columns, column, task.name, name))
        return None
    return _as_text(columns[column], column)


def _answers(columns: Mapping[str, Any], task: TaskSection) -> list[str]:
    """The right answers in the row's `answer` column, which holds one or a list of them; none where there is none."""
    column = task.columns.get("answer", "answer")
    if not isinstance(columns.get(column), list):
        answer = _optional(columns, task, "answer")
        return [answer] if answer else []
    found = [_as_text(one, column) for one in columns[column]]
    if not found or not all(text and text.strip() for text in found):
        raise BadRow(f"the column {column!r} (`answer`) has an empty list, or an empty answer in it")
    return list(dict.fromkeys(text for text in found if text))


def _as_text(value: Any, column: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"the column {column!r} has a {type(value).__name__}; expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"the column {column!r} is not UTF-8 text; save the file as UTF-8") from None
    return value

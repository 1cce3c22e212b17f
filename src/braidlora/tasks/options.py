"""How a task's options are written as answers. Imports no torch."""

from __future__ import annotations

from braidlora.tasks._task import Row, Task


def answers_of(row: Row) -> list[str]:
    """What a `generate` row is scored by: its `answer` or answers, or its `output` where it has none of its own."""
    answer = row["answer"] if "answer" in row else row["output"]
    return [answer] if isinstance(answer, str) else answer


def option_texts(task: Task) -> list[str]:
    """How each of the task's options is written as an answer, for ranking.

    An option may be the bare answer (`true`) of rows whose output is a sentence (`the correct answer is true`). If all
    training rows with that answer have the same output, this is the output that training teaches, and it is used;
    otherwise the option itself. A task read from an adapter's card has no rows; its card records the texts.
    """
    if task.option_texts is not None:
        return task.option_texts
    outputs: dict[str, set[str]] = {}
    for row in task.train:
        for answer in answers_of(row):
            outputs.setdefault(answer, set()).add(row["output"])
    texts = []
    for option in task.options or []:
        seen = outputs.get(option, set())
        texts.append(next(iter(seen)) if len(seen) == 1 else option)
    return texts

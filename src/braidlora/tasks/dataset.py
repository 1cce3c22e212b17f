"""The encoded rows of all tasks in one torch dataset, stored as flat token arrays."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from braidlora.config import PromptSection
from braidlora.errors import DataError
from braidlora.tasks._task import Part, Row, Task
from braidlora.tasks.encode import IGNORED, Encoded, Rejected, encode_examples, encode_texts
from braidlora.tasks.labels import LabelSpace

_BATCH = 1000  # rows tokenized at once
_REASONS = 5  # rejected rows quoted in the counts
_WORDLESS = 8  # a prompt of fewer tokens says nothing


@dataclass
class EncodedCounts:
    """Statistics of one task's encoded rows: `rows` kept, `dropped` (too long), `truncated`, and their tokens.

    `rejected` are chats that the chat template cannot render exactly, with the first few reasons in `problems`.
    `no_prompt`: cut rows that keep less than a tenth of their prompt, or less than eight tokens of it. `fits_most` and
    `fits_all`: the cutoffs that 95% and all of the rows would need.
    """

    rows: int = 0
    dropped: int = 0
    rejected: int = 0
    truncated: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    no_prompt: int = 0
    fits_most: int = 0
    fits_all: int = 0
    problems: list[str] = field(default_factory=list)


class MultiTaskDataset(Dataset[dict[str, Any]]):
    """The encoded rows of several tasks, task by task.

    Item i is `{"input_ids": list[int], "labels": list[int] | int, "task_id": int}`: for `generate` tasks a label per
    token (-100 where the token carries no loss), for `classify` the class in the union of all labels.

    Attributes:
        task_names: the tasks' names, indexed by task id.
        task_ids: the task id of every row.
        counts: `EncodedCounts` by task name.
    """

    def __init__(self, task_names: Sequence[str], kind: str) -> None:
        self.task_names = list(task_names)
        self.kind = kind
        self.task_ids: list[int] = []
        self.counts = {name: EncodedCounts() for name in self.task_names}
        # 170,000 rows as lists of Python ints take gigabytes; at four bytes per token they take a tenth of that.
        self._tokens = array("i")
        self._ends = array("q", [0])
        self._classes = array("i")  # of `classify` rows
        # Of `generate` rows: where loss begins and ends, in turn, and how many such places there are up to each row.
        self._places, self._place_ends = array("i"), array("q", [0])

    def add(self, task_id: int, input_ids: Sequence[int], labels: Sequence[int] | int) -> None:
        """Append a row; `labels` is its class (`classify`), or a label per token, -100 for those without loss."""
        self._tokens.extend(input_ids)
        self._ends.append(len(self._tokens))
        if isinstance(labels, int):
            self._classes.append(labels)
        else:
            with_loss = [False, *(label != IGNORED for label in labels), False]
            self._places.extend(at for at, (a, b) in enumerate(itertools.pairwise(with_loss)) if a != b)
            self._place_ends.append(len(self._places))
        self.task_ids.append(task_id)

    def __len__(self) -> int:
        return len(self.task_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        input_ids = self._tokens[self._ends[index] : self._ends[index + 1]].tolist()
        labels: list[int] | int
        if self.kind == "classify":
            labels = self._classes[index]
        else:
            labels = [IGNORED] * len(input_ids)
            places = self._places[self._place_ends[index] : self._place_ends[index + 1]]
            for start, end in zip(places[::2], places[1::2], strict=True):
                labels[start:end] = input_ids[start:end]
        return {"input_ids": input_ids, "labels": labels, "task_id": self.task_ids[index]}

    def lengths(self) -> list[int]:
        """The number of tokens of every row."""
        return [self._ends[index + 1] - self._ends[index] for index in range(len(self))]


def encode_tasks(
    tasks: Sequence[Task],
    tokenizer: Any,
    prompt: PromptSection,
    part: Part = "train",
    label_space: LabelSpace | None = None,
) -> MultiTaskDataset:
    """Encode one part of all tasks.

    Args:
        tasks: all of one kind; task id i is `tasks[i]`.
        tokenizer: the base model's tokenizer.
        prompt: the recipe's `prompt` section (`cutoff`, `train_on_prompt`).
        part: `train` or `validation` (tasks without validation rows contribute none).
        label_space: for `classify` tasks; built from the tasks if not given.

    Raises:
        ConfigError: the tokenizer lacks an EOS token, or a chat template that the tasks need.
        DataError: no row of a task fits within the cutoff, the chat template rejects a row, or no task has training
            rows.
    """
    kind = tasks[0].kind
    dataset = MultiTaskDataset([task.name for task in tasks], kind)
    if kind == "classify" and label_space is None:
        label_space = LabelSpace.of(tasks)
    for task_id, task in enumerate(tasks):
        rows, counts = task.rows(part), dataset.counts[task.name]
        lengths = array("i")  # before any cut
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            if label_space is not None and kind == "classify":
                for row, text in zip(
                    batch, encode_texts(batch, task.template, tokenizer, prompt.cutoff), strict=True
                ):
                    dataset.add(task_id, text.input_ids, label_space.index(row["label"]))
                    _count(counts, text, 0)
                    lengths.append(text.whole)
                continue
            for encoded in _examples(batch, task, part, tokenizer, prompt):
                if isinstance(encoded, Rejected):
                    counts.rejected += 1
                    counts.problems += [encoded.problem] if len(counts.problems) < _REASONS else []
                    continue
                if encoded is None:
                    counts.dropped += 1
                    continue
                dataset.add(task_id, encoded.input_ids, encoded.labels)
                _count(counts, encoded, sum(label != IGNORED for label in encoded.labels))
                lengths.append(encoded.whole)
        if lengths:
            in_order = sorted(lengths)
            counts.fits_most, counts.fits_all = in_order[math.ceil(0.95 * len(in_order)) - 1], in_order[-1]
        if counts.rejected and counts.rejected == len(rows):
            raise DataError(
                f"task {task.name}, {part}: all {len(rows)} chats were rejected. The first: {counts.problems[0]}"
            )
        if rows and counts.rows == 0:
            raise DataError(
                f"task {task.name}, {part}: all {len(rows)} rows were dropped because answer and EOS alone exceed "
                f"prompt.cutoff={prompt.cutoff} tokens. Raise the cutoff."
            )
    if part == "train" and len(dataset) == 0:
        raise DataError("no task has training rows; give at least one task a `train` source.")
    return dataset


def _examples(
    rows: list[Row], task: Task, part: Part, tokenizer: Any, prompt: PromptSection
) -> list[Encoded | Rejected | None]:
    try:
        return encode_examples(rows, task.template, tokenizer, prompt)
    except DataError as error:
        raise DataError(f"task {task.name}, {part}: {error}") from None


def _count(counts: EncodedCounts, row: Encoded, loss_tokens: int) -> None:
    counts.rows += 1
    counts.truncated += row.truncated
    counts.tokens += len(row.input_ids)
    counts.loss_tokens += loss_tokens
    counts.longest = max(counts.longest, len(row.input_ids))
    answer = len(row.input_ids) - row.prompt
    counts.no_prompt += (
        row.truncated and answer > 0 and row.prompt < max(_WORDLESS, (row.whole - answer) // 10)
    )

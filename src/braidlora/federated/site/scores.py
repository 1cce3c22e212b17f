"""Scores of one client's model: on its own test rows, and on the common test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braidlora.config import EvaluateSampleSection
from braidlora.evaluation.balance import balance
from braidlora.evaluation.questions import Questions
from braidlora.evaluation.run import check_evaluation
from braidlora.evaluation.scoring import record, references, task_metrics
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.site.clients import Client
from braidlora.federated.site.host import Host
from braidlora.runs import atomic_write_text
from braidlora.tasks import Task

MOST_SCORED = 20  # clients in a round before the last one, unless the recipe says otherwise


def scored_clients(clients: Iterable[str], sample: EvaluateSampleSection, seed: int) -> set[str]:
    """The clients that are scored in the rounds before the last one: the same in all of them.

    Names are ordered by a hash with the recipe's seed, and the first ones are taken, so that a client that joins or
    leaves replaces one other at most.
    """
    names = sorted(clients, key=lambda name: (derive_seed(seed, "scored", name), name))
    if sample.fraction is not None:
        return set(names[: max(1, round(sample.fraction * len(names)))])
    return set(names[: sample.number or MOST_SCORED])


@dataclass(frozen=True)
class Scores:
    """`{"metric", "score", "n"}` per task, own and common, and the lines of the prediction files by task."""

    own: dict[str, dict[str, Any]]
    common: dict[str, dict[str, Any]]
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict, compare=False)

    @property
    def mean(self) -> float | None:
        """Over the client's own tasks; None without test rows."""
        return balance({name: task["score"] for name, task in self.own.items()}).mean

    @property
    def common_mean(self) -> float | None:
        """Over the tasks of the common test; None where there is none."""
        return balance({name: task["score"] for name, task in self.common.items()}).mean

    def write_predictions(self, folder: Path) -> None:
        """Write `TASK.jsonl` for each of the client's own tasks, one line per test row; remove all others."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # of a task that the client no longer has
            if path.suffix == ".jsonl" and path.stem not in self.records:
                path.unlink()
        for task, lines in self.records.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            atomic_write_text(folder / f"{task}.jsonl", text)

    def without_records(self) -> Scores:
        """The scores alone: the server does not need the answers of all clients."""
        return Scores(self.own, self.common)

    def to_json(self) -> dict[str, Any]:
        """Without the predictions."""
        return {"own": self.own, "common": self.common}


class Scorer:
    """Scores the active adapter of a host; test rows are encoded once.

    Args:
        host: the model.
        common: tasks of the common test. A client that keeps its own classification head is scored on those whose
            labels it trains on.
    """

    def __init__(self, host: Host, common: Sequence[Task]) -> None:
        self._host = host
        self._common = [_Test(task, host) for task in common if task.test]
        self._own: dict[str, list[_Test]] = {}

    def score(self, client: Client) -> Scores:
        """Score the active adapter on the client's test rows and the common test."""
        if client.name not in self._own:
            tasks = [task for task in client.tasks if task.test]
            check_evaluation(self._host.model, self._host.tokenizer, tasks, self._host.config)
            self._own[client.name] = [_Test(task, self._host) for task in tasks]
        own, records = {}, {}
        for test in self._own[client.name]:
            records[test.task.name] = test.answered()
            own[test.task.name] = task_metrics(test.task, records[test.task.name])
        common = {
            test.task.name: task_metrics(test.task, test.answered())
            for test in self._common
            if self._has_head(client, test.task)
        }
        return Scores(own, common, records)

    def _has_head(self, client: Client, task: Task) -> bool:
        """Whether the client's head was trained on the task's labels, by itself or by the clients that share it.

        An untrained head answers at random, and says nothing about the shared factors.
        """
        if self._host.label_space is None or self._host.rule.also_share:
            return True
        trained = {label for one in client.tasks if one.train for label in one.labels or []}
        return trained >= set(task.labels or [])


class _Test:
    """The encoded test rows of one task."""

    def __init__(self, task: Task, host: Host) -> None:
        self.task = task
        self._questions = Questions(task, host.model, host.tokenizer, host.config, host.label_space)
        self._expected = references(task)
        self._prompts = [task.template.prompt(row, host.tokenizer, evaluation=True) for row in task.test]

    def answered(self) -> list[dict[str, Any]]:
        """A record for every row, in order."""
        answers = dict(self._questions.answers(range(len(self.task.test))))
        rows = enumerate(zip(self._prompts, self._expected, strict=True))
        return [record(self.task, index, prompt, right, answers[index]) for index, (prompt, right) in rows]

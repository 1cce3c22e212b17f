"""The clients of a federation with their rows, as a simulation loads them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.config import SUFFIXES, ClientSection, DataSource, FederatedConfig, TaskSection
from braidlora.errors import ConfigError, DataError
from braidlora.evaluation.scoring import answer_of
from braidlora.federated.protocol.clients import TrainingClient
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.site.partition import Rows, divide, group
from braidlora.paths import find_data
from braidlora.tasks import PARTS, LabelSpace, Part, Row, Task, fingerprints, load_tasks

_COLUMN = "column"  # the field in which rows keep the value they are divided by


@dataclass(frozen=True)
class Client(TrainingClient):
    """A client at its own site, with its rows.

    Args:
        tasks: every task of the recipe, in order, with the client's own rows: none in tasks that it does not have. So
            task numbers mean the same to all clients.
        numbers: if a task was divided, by part, the indices of the client's rows among those of the whole task, from
            0; None if nothing was.
    """

    tasks: list[Task]
    numbers: Rows | None = None

    def own_tasks(self) -> list[Task]:
        """The tasks that the client has rows of."""
        return [task for task in self.tasks if task.train or task.test]


@dataclass(frozen=True)
class Clients:
    """All clients of a federation, by name in sorted order, and what they have in common.

    Args:
        by_name: the clients.
        label_space: for `classify` tasks, the same for all.
        common: tasks with the test rows that every client's model is scored on.
    """

    by_name: dict[str, Client]
    label_space: LabelSpace | None
    common: list[Task]

    def report(self) -> dict[str, Any]:
        """The content of `partition.json`: per client rank, scaling, seed, and rows, labels and sha256 of each task."""
        return {
            name: {
                "rank": client.rank,
                "scaling": client.scaling,
                "seed": client.seed,
                "tasks": {task.name: _rows_report(task) for task in client.own_tasks()},
            }
            for name, client in self.by_name.items()
        }

    def row_numbers(self) -> str:
        """The content of `partition_rows.jsonl`: a line per client and part of a divided task; empty otherwise."""
        lines = [
            {"client": name, "part": part, "rows": rows}
            for name, client in self.by_name.items()
            for part, rows in (client.numbers or {}).items()
            if rows
        ]
        return "".join(json.dumps(line) + "\n" for line in lines)


def load_clients(config: FederatedConfig) -> Clients:
    """Read the recipe's tasks and give every client its rows.

    Raises:
        ConfigError: a setting does not fit the tasks, or the clients found in the data.
        DataError: a source or row cannot be used, or a client has too few rows.
    """
    partition = config.federation.partition
    numbers: dict[str, Rows] = {}
    if partition is not None and partition.by == "file":
        rows, tasks = _by_file(config)
    elif partition is not None:
        rows, tasks, numbers = _divided(config)
    else:
        tasks = load_tasks(config)
        rows = {
            client.name: {task.name: task for task in tasks if task.name in client.tasks}
            for client in config.clients() or []
        }
    sections = config.clients() or config.clients_called(list(rows))
    clients = {}
    for section in sections:
        own = [rows[section.name].get(task.name) or with_rows(task, {}) for task in tasks]
        clients[section.name] = make_client(config, section, own, numbers.get(section.name))
    return Clients(
        by_name=dict(sorted(clients.items())),
        label_space=LabelSpace.of(tasks) if config.kind == "classify" else None,
        common=[task for task in tasks if task.name in config.federation.common_test],
    )


def make_client(
    config: FederatedConfig, section: ClientSection, tasks: list[Task], numbers: Rows | None = None
) -> Client:
    """A client of the recipe; raises DataError if it has no training rows."""
    derived = derive_seed(config.seed, "client", section.name)
    client = Client(
        name=section.name,
        rank=section.rank or config.adapter.r,
        scaling=config.scaling_of(section),
        seed=derived if section.seed is None else section.seed,
        tasks=tasks,
        numbers=numbers,
    )
    if not any(task.train for task in tasks):
        names = ", ".join(task.name for task in client.own_tasks()) or "none"
        raise DataError(f"client {client.name}: no training rows (its tasks: {names}).")
    return client


def with_rows(task: Task, rows: Mapping[Part, list[Row]]) -> Task:
    """The task with these rows in place of its own; none in parts that are not given."""
    train, validation, test = (rows.get(part, []) for part in PARTS)
    return dataclasses.replace(task, train=train, validation=validation, test=test)


def _divided(config: FederatedConfig) -> tuple[dict[str, dict[str, Task]], list[Task], dict[str, Rows]]:
    """A partition by label shares, at random or by column: tasks per client, undivided tasks, row numbers by client."""
    partition = config.federation.partition
    assert partition is not None
    name = config.divided_task()
    section = next(task for task in config.tasks if task.name == name)
    tasks = load_tasks(config, {name: partition.column} if partition.column else None)
    divided = next(task for task in tasks if task.name == name)
    field = _COLUMN if partition.column else "label" if divided.kind == "classify" else "output"
    values = {part: _values(divided.rows(part), field, section) for part in PARTS}
    if partition.by == "column":
        by_client = {_client_name(value): rows for value, rows in group(values).items()}
        if len(by_client) < len(set(values["train"]) | set(values["test"])):
            raise DataError(
                f"federation.partition.column: two values of {partition.column!r} make the same client name; "
                "rename one of them."
            )
        small = {
            n: len(rows["train"]) for n, rows in by_client.items() if len(rows["train"]) < partition.min_rows
        }
        if small:
            raise DataError(
                f"federation.partition: fewer than min_rows = {partition.min_rows} training rows: "
                + ", ".join(f"{one} {count}" for one, count in small.items())
                + ". Lower min_rows, or leave those values out with `where`."
            )
    else:
        sections = config.clients() or []
        by_client = dict(zip([one.name for one in sections], divide(values, partition), strict=True))
    plain = {part: [_without_column(row) for row in divided.rows(part)] for part in PARTS}
    undivided = with_rows(divided, plain)
    given = {}
    for client, rows in by_client.items():
        own = {part: [plain[part][row] for row in rows[part]] for part in PARTS}
        given[client] = {name: with_rows(undivided, own)}
    return given, [undivided if task.name == name else task for task in tasks], by_client


def _values(rows: Sequence[Row], field: str, section: TaskSection) -> list[str]:
    if any(field not in row for row in rows):
        raise ConfigError(
            f"federation.partition.column: rows of {section.train and section.train.source} have no columns of their "
            "own; leave it out to divide by answers."
        )
    return [row[field] for row in rows]


def _without_column(row: Row) -> Row:
    return {field: text for field, text in row.items() if field != _COLUMN}


def _client_name(value: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.\-]+", "-", value).rstrip("-.").lstrip("-._")
    if not name:
        raise DataError(f"federation.partition.column: the value {value!r} does not yield a client name.")
    return name


def _by_file(config: FederatedConfig) -> tuple[dict[str, dict[str, Task]], list[Task]]:
    """A client per file in the folder `train`; labels are the union of the clients'."""
    name = config.divided_task()
    section = next(task for task in config.tasks if task.name == name)
    assert section.train is not None
    others = [task for task in config.tasks if task.name != name]
    loaded: dict[str, Task] = {}
    for client, sources in client_files(section).items():
        own = section.model_copy(update=sources)
        [loaded[client]] = load_tasks(config.model_copy(update={"tasks": [own]}))
    labels = sorted({label for task in loaded.values() for label in task.labels or []})
    given = {
        client: {name: dataclasses.replace(task, labels=section.options or labels) if labels else task}
        for client, task in loaded.items()
    }
    rest = load_tasks(config.model_copy(update={"tasks": others})) if others else []
    tests = [one[name].test for one in given.values()]
    if section.test is not None and section.test.source and not find_data(section.test.source).is_dir():
        tests = tests[:1]  # one file on which all clients are tested
    first = next(iter(given.values()))[name]
    undivided = with_rows(first, {"test": [row for rows in tests for row in rows]})
    known = {task.name: task for task in [undivided, *rest]}
    return given, [known[task.name] for task in config.tasks]


def client_files(section: TaskSection, only: str | None = None) -> dict[str, dict[str, DataSource | None]]:
    """Per client its sources: `train/NAME.jsonl`, and for a test folder the file of the same name there.

    Args:
        only: a client, whose site need not have the files of others in both folders, and may have a single file of
            any name in place of the folder.
    """
    assert section.train is not None
    own = find_data(section.train.source) if section.train.source else None
    if only is not None and own is not None and own.is_file():
        train = {only: own}
    else:
        train = _files_in(section.train, section.name)
    if not train:
        raise DataError(
            f"task {section.name}: {section.train.source} has no client files; expected NAME.jsonl for each "
            f"(or {', '.join(SUFFIXES)})."
        )
    sources: dict[str, dict[str, DataSource | None]] = {
        client: {"train": section.train.model_copy(update={"source": str(path)})}
        for client, path in train.items()
        if only in (None, client)
    }
    if section.test is not None and section.test.source and find_data(section.test.source).is_dir():
        test = _files_in(section.test, section.name)
        if only is None and (foreign := sorted(set(test) - set(train))):
            raise DataError(
                f"task {section.name}: {section.test.source} has {', '.join(foreign)}, but {section.train.source} has "
                "no training rows of that name."
            )
        for client, parts in sources.items():
            source = {"source": str(test.get(client))}
            parts["test"] = section.test.model_copy(update=source) if client in test else None
    return sources


def _files_in(source: DataSource, task: str) -> dict[str, Path]:
    folder = find_data(source.source)
    if not folder.is_dir():
        raise DataError(
            f"task {task}: {source.source} is not a folder; `by: file` needs one with a file per client."
        )
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    names = [_client_name(path.stem) for path in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"task {task}: {source.source} has two files for client {twice}; keep one.")
    return dict(zip(names, files, strict=True))


def _rows_report(task: Task) -> dict[str, Any]:
    prints = fingerprints([task])[task.name]
    report: dict[str, Any] = {}
    for part in PARTS:
        rows = task.rows(part)
        if rows:
            report[part] = {"rows": len(rows), "sha256": prints[part], "values": _histogram(rows, task)}
    return report


def _histogram(rows: Iterable[Row], task: Task) -> dict[str, int] | None:
    """How many rows have each label or answer; None for free text."""
    counts = Counter(row["label"] if task.kind == "classify" else answer_of(row) for row in rows)
    limited = task.kind == "classify" or len(counts) <= 20
    return dict(sorted(counts.items())) if limited else None

"""`braidlora preview`: what the model will be trained on: rows, tokens with loss, counts, mixing."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable
from typing import Any

from braidlora.config import RunConfig
from braidlora.tables import plural
from braidlora.tasks._task import Task
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows
from braidlora.tasks.class_weights import class_weights
from braidlora.tasks.dataset import MultiTaskDataset, encode_tasks
from braidlora.tasks.encode import IGNORED
from braidlora.tasks.labels import LabelSpace
from braidlora.tasks.load import check_chat_settings, load_tasks
from braidlora.tasks.mixing import MixingSampler
from braidlora.tasks.report import data_report, read_lines, size_line
from braidlora.terminal import BOLD, DIM, PLAIN, printable

_CLIENTS = 20  # shown


def preview(
    config: RunConfig,
    tokenizer: Any,
    rows: int = 2,
    as_json: bool = False,
    *,
    tasks: list[Task] | None = None,
    clients: dict[str, Any] | None = None,
) -> str | dict[str, Any]:
    """Load and encode all rows of a recipe, and show a few of each task.

    Args:
        config: the recipe.
        tokenizer: the base model's tokenizer; nothing else of it is needed.
        rows: number of training rows to show of each task.
        as_json: return the dictionary from which the text is made.
        tasks: the tasks with their rows; loaded from the recipe by default.
        clients: for a federated recipe, `{name: {"rank", "rows": {task: {part: count}}}}`.

    Returns:
        The text, in which tokens that carry loss are bold on a terminal and in ⟦ ⟧ elsewhere; or the dictionary
        `{"kind", "rows_per_epoch", "cutoff", "warnings", "tasks": {name: {"metric", "mode", "probability",
        "draws_per_epoch", "sizes", "data", "examples": [{"token_ids", "tokens", "loss", "parts": [{"text", "loss"}],
        "label"}]}}}`, and `clients`.

    Raises:
        ConfigError, DataError: as training would raise for the same rows and prompts.
    """
    tasks = load_tasks(config) if tasks is None else tasks
    check_chat_settings(tasks, config.prompt)
    result = _collect(config, tasks, tokenizer, rows)
    if clients is not None:
        result["clients"] = clients
        # These describe one training on all rows, which a federation does not do.
        del result["rows_per_epoch"]
        for task in result["tasks"].values():
            del task["probability"], task["draws_per_epoch"]
    if as_json:
        return result
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return _text(result, colours)


def _collect(config: RunConfig, tasks: list[Task], tokenizer: Any, rows: int) -> dict[str, Any]:
    labels = LabelSpace.of(tasks) if config.kind == "classify" else None
    class_weights(config, tasks, labels)
    found = warn_of_rows(tasks, config)
    train = encode_tasks(tasks, tokenizer, config.prompt, "train", labels)
    found += warn_of_lengths({"train": train}, config) + warn_of_prompts(tasks, tokenizer, config)
    report = data_report(tasks, {"train": train})
    sampler = MixingSampler(train, config.mixing, config.seed)
    names = labels.names if labels is not None else None
    shown = {}
    for task_id, task in enumerate(tasks):
        own = [index for index, owner in enumerate(train.task_ids) if owner == task_id]
        random.Random(f"preview/{config.seed}/{task.name}").shuffle(own)
        shown[task.name] = {
            "metric": task.metric,
            "mode": "classify" if task.kind == "classify" else task.mode or config.evaluation.mode,
            "labels": task.labels,
            "options": task.options,
            "probability": sampler.probabilities[task.name],
            "draws_per_epoch": sampler.draws[task_id],
            "data": report["tasks"][task.name],
            "sizes": size_line(task),
            "examples": [_example(train, index, tokenizer, names) for index in sorted(own[:rows])],
        }
    return {
        "kind": config.kind,
        "cutoff": config.prompt.cutoff,
        "train_on_prompt": config.prompt.train_on_prompt,
        "mixing": config.mixing.strategy,
        "rows_per_epoch": len(sampler),
        "warnings": found,
        "tasks": shown,
    }


def _example(
    dataset: MultiTaskDataset, index: int, tokenizer: Any, labels: list[str] | None
) -> dict[str, Any]:
    item = dataset[index]
    ids = item["input_ids"]
    loss = [False] * len(ids) if labels else [label != IGNORED for label in item["labels"]]
    return {
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "token_ids": ids,
        "loss": loss,
        "parts": [
            {"text": _decode(tokenizer, [ids[at] for at in places]), "loss": with_loss}
            for with_loss, places in (
                (key, list(group)) for key, group in itertools.groupby(range(len(ids)), loss.__getitem__)
            )
        ],
        "label": labels[item["labels"]] if labels else None,
    }


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _text(result: dict[str, Any], colours: bool) -> str:
    def mark(text: str) -> str:
        return f"{BOLD}{text}{PLAIN}" if colours else f"⟦{text}⟧"

    def dim(text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if colours else text

    clients = result.get("clients", {})
    count = f"{len(clients)} clients, " if clients else ""
    mixed = " within each client" if clients else f", {result['rows_per_epoch']} rows per epoch"
    lines = [
        f"{count}{plural(len(result['tasks']), result['kind'] + ' task')}, mixing {result['mixing']}{mixed}, cutoff "
        f"{result['cutoff']} tokens"
    ]
    if result["kind"] == "generate":
        lines[0] += f"; tokens that contribute to the loss are marked {mark('like this')}"
    lines += _client_lines(clients, dim)
    for name, task in result["tasks"].items():
        lines += ["", *_task_lines(name, task, mark, dim, federated=bool(clients))]
    return "\n".join(lines)


def _client_lines(clients: dict[str, Any], dim: Callable[[str], str]) -> list[str]:
    lines = []
    for name, client in list(clients.items())[:_CLIENTS]:
        rows = "; ".join(
            f"{task} " + ", ".join(f"{count} {part}" for part, count in parts.items())
            for task, parts in client["rows"].items()
        )
        lines.append(dim(f"   {name}  rank {client['rank']}: {rows}"))
    if len(clients) > _CLIENTS:
        lines.append(dim(f"   and {len(clients) - _CLIENTS} more clients; --json lists them all"))
    return lines


def _task_lines(
    name: str,
    task: dict[str, Any],
    mark: Callable[[str], str],
    dim: Callable[[str], str],
    *,
    federated: bool = False,
) -> list[str]:
    data = task["data"]
    lines = [f"━━ {name} ({task['metric']})  {task['sizes']}"]
    if task["labels"]:
        lines.append(dim(f"   labels {printable(', '.join(task['labels']))}"))
    if task["mode"] == "rank":
        lines.append(
            dim(f"   answered by ranking {printable(', '.join(task['options'] or ['(no options)']))}")
        )
    lines += [dim(f"   {line}") for line in read_lines(data)]
    encoded = data.get("train", {}).get("encoded")
    if not encoded:
        return [*lines, dim("   no training rows; this task is only tested")]
    facts = f"{encoded['tokens'] / encoded['rows']:.0f} tokens per row, longest {encoded['longest']}, "
    if not federated:  # there it depends on the other tasks of a client
        facts = (
            f"drawn {task['probability']:.1%} of the time, {task['draws_per_epoch']} rows per epoch; {facts}"
        )
    if not task["labels"]:
        facts += f"{encoded['loss_tokens']} of {encoded['tokens']} contribute to the loss; "
    rejected = f", {encoded['rejected']} rejected" if encoded["rejected"] else ""
    lines.append(dim(f"   {facts}{encoded['truncated']} truncated, {encoded['dropped']} dropped{rejected}"))
    if encoded["problems"]:
        lines.append(dim(f"   the first rejected row: {printable(encoded['problems'][0])}"))
    sequences = encoded["rows"] + encoded["dropped"] + encoded["rejected"]
    if sequences > data["train"]["rows"]:
        lines.append(
            dim(
                f"   {data['train']['rows']} chats in {sequences} sequences, because the chat template renders earlier "
                "turns differently from the last one"
            )
        )
    for part, counts in data.items():
        if counts["skipped"]:
            first = printable(counts["problems"][0])
            lines.append(dim(f"   {part}: {counts['skipped']} bad rows skipped; the first: {first}"))
        if counts.get("in_train"):
            lines.append(dim(f"   {counts['in_train']} test prompts are also in the training rows"))
    for example in task["examples"]:
        loss = sum(example["loss"])
        lines.append(dim(f"   · {len(example['tokens'])} tokens" + (f", {loss} with loss" if loss else "")))
        text = "".join(
            mark(printable(part["text"])) if part["loss"] else printable(part["text"])
            for part in example["parts"]
        )
        if example["label"] is not None:
            text += f" → {mark(printable(example['label']))}"
        lines += [f"     {line}" for line in text.split("\n")]
    return lines

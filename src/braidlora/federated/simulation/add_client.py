"""A client that joins a finished federation: it receives the shared state, and trains its own factors."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braidlora.config import (
    SUFFIXES,
    ClientSection,
    DataSource,
    FederatedConfig,
    RateScheduleSection,
    TaskSection,
    load_config,
    name_problem,
)
from braidlora.errors import ConfigError
from braidlora.federated.protocol.client import first_state, received
from braidlora.federated.protocol.factors import split
from braidlora.federated.protocol.payload import make_payload
from braidlora.federated.protocol.rules import spec_of
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.protocol.wire import pack
from braidlora.federated.simulation.final import final_files, fixed_keys, host_of, last_round
from braidlora.federated.site.export import save_client_adapter
from braidlora.federated.site.load import load_site, warn_of_site
from braidlora.federated.site.local_training import train_locally
from braidlora.federated.site.scores import Scorer
from braidlora.runs import (
    FederatedDirectory,
    atomic_write_text,
    cover,
    hold,
    is_leftover,
    json_text,
    remove_tree,
)
from braidlora.tasks import LabelSpace
from braidlora.training.failures import explain_disk_failures
from braidlora.training.stop import stop_requests
from braidlora.training.threads import cpu_threads


def add_client(
    directory: Path,
    name: str,
    *,
    tasks: Sequence[str],
    train: str | None = None,
    test: str | None = None,
    rank: int | None = None,
    epochs: float | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a client that the federation has not seen, and write its adapter into `clients/NAME` there.

    If factors stay with clients (A of fed-alora, A and M of fed-alora-het, B of fedsa-lora), only those are trained,
    and the shared ones stay as received. Under the other rules everything that a client trains is shared, and the new
    client continues to train it. The federation itself does not change.

    Args:
        directory: of a finished federation.
        name: of the new client.
        tasks: names of the recipe's tasks whose rows it has; a task on which no client trains may be in common_test.
        train, test: other rows for the only task in `tasks`; the recipe's `where` and `limit` of that task apply.
        rank: default: that of all clients, or adapter.r where they differ.
        epochs: default: as many as a client had in all rounds.
        overrides: `dotted.key=value` for the federation's recipe, such as another learning rate.

    Returns:
        `{"client", "rule", "directory", "trained", "rank", "rows", "received_bytes", "tasks", "before", "after",
        "loss", "seconds"}`; also written to `clients/NAME/added.json`.

    Raises:
        ConfigError: the name is taken, a task is unknown, nothing is shared, the rank does not fit the rule, or an
            override contradicts the federation's settings.
        CheckpointError: the federation is not finished or damaged, or the base model is another one.
        DataError, TrainingError: as in training.
    """
    start, run = time.monotonic(), FederatedDirectory.at(directory)
    with hold(run.path, instead="use another copy of the federation"):
        experiment, saved = last_round(run)
        config = load_config(run.config, overrides, FederatedConfig, content=run.read(run.config.name))
        members = run.read_json(run.partition.name)
        _check(config, run, members, name, tasks, rank, epochs, (train, test), overrides)
        config = _lengthened(config, epochs)
        label_space = None
        if config.kind == "classify":
            label_space = LabelSpace.parse(run.labels, run.read(run.labels.name))
        with stop_requests(), cpu_threads(config.training.threads):
            recipe = _recipe_of(config, name, tasks, (train, test), rank or _rank_of(members, config))
            site = load_site(recipe, name, label_space, common=False)
            warn_of_site(recipe, site)
            client = dataclasses.replace(site.client, scaling=_scaling_of(members, config))
            host = host_of(run, config, label_space, experiment)
            # It has no part in any round, whatever its name.
            state = dataclasses.replace(saved.state, counted={})
            payload = make_payload(host.rule, state, client, saved.round + 1)
            own = received(host, client, payload, first_state(host, client, experiment["id"]))
            spec = host.rule.spec
            # Where no factor stays with a client, the new one trains everything that the rule trains.
            trains, frozen = (spec.stays, host.rule.also_share) if spec.stays else (spec.trains, ())
            host.load(client.rank, client.scaling, own, trains, frozen)
            scorer = Scorer(host, [])
            before = scorer.score(client)
            trained = train_locally(host, client, 1, derive_seed(client.seed, "added"), {})
            after = scorer.score(client)
            carried = {key: tensor for key, tensor in own.items() if split(key)[1] in spec.carried}
            result = {
                "client": name,
                "rule": config.federation.rule,
                "directory": str(run.client(name)),
                "trained": list(trains),
                "rank": client.rank,
                "rows": len(host.rows(client)),
                "received_bytes": len(pack(payload.tensors)),
                "tasks": after.own,
                "before": before.mean,
                "after": after.mean,
                "loss": trained.loss,
                "seconds": round(time.monotonic() - start, 3),
            }
            with explain_disk_failures(run, "then start again with the same command"):
                remove_tree(run.client(name) / "predictions")
                save_client_adapter(host, client, {**host.read(), **carried}, run.client(name) / "adapter")
                after.write_predictions(run.client(name) / "predictions")
                text = json_text(result)
                cover(run.path, final_files(run, name), {f"clients/{name}/added.json": text.encode()})
                atomic_write_text(run.client(name) / "added.json", text)
    return result


def _rank_of(members: Mapping[str, Any], config: FederatedConfig) -> int:
    """The rank of all clients, as `partition.json` has it; adapter.r where they differ."""
    ranks = {int(one["rank"]) for one in members.values()}
    return ranks.pop() if len(ranks) == 1 else config.adapter.r


def _scaling_of(members: Mapping[str, Any], config: FederatedConfig) -> float:
    """The scaling of all clients, with which the shared factors were trained; that of `adapter` where they differ."""
    # Scalings that a recipe's check takes for equal may differ in their last digits.
    scalings = {round(one["scaling"], 9): float(one["scaling"]) for one in members.values()}
    return scalings.popitem()[1] if len(scalings) == 1 else config.scaling


def _was_interrupted(folder: Path) -> bool:
    """Whether this is what an interrupted call left, and nothing else."""
    return folder.is_dir() and all(
        entry.name in ("adapter", "predictions") or is_leftover(entry.name) for entry in folder.iterdir()
    )


def _lengthened(config: FederatedConfig, epochs: float | None) -> FederatedConfig:
    """The recipe with one local training as long as that of all rounds together, or of `epochs`."""
    federation = config.federation
    local = federation.local
    if epochs is not None:
        local = local.model_copy(update={"epochs": epochs, "steps": None})
    elif local.steps is not None:
        local = local.model_copy(update={"steps": local.steps * federation.rounds})
    else:
        local = local.model_copy(update={"epochs": (local.epochs or 1.0) * federation.rounds})
    # One long round: its learning rate is the recipe's, with training.scheduler.
    changed = {"local": local, "optimizer_state": "restart", "lr_schedule": RateScheduleSection()}
    return config.model_copy(update={"federation": federation.model_copy(update=changed)})


def _check(
    config: FederatedConfig,
    run: FederatedDirectory,
    members: Mapping[str, Any],
    name: str,
    tasks: Sequence[str],
    rank: int | None,
    epochs: float | None,
    rows: tuple[str | None, str | None],
    overrides: Sequence[str],
) -> None:
    known = [task.name for task in config.tasks]
    spec = spec_of(config.federation.rule)
    problems = []
    if not spec.shares:
        problems.append(f"rule {spec.name} shares nothing that a new client could receive")
    if problem := name_problem(name):
        problems.append(f"--name: {problem}")
    elif name in members:
        problems.append(f"--name {name}: a client of this federation has this name; choose another")
    elif run.client(name).exists() and not _was_interrupted(run.client(name)):
        problems.append(
            f"--name {name}: {run.client(name)} exists, and is not overwritten; choose another name, or remove it"
        )
    if unknown := sorted(set(tasks) - set(known)):
        problems.append(f"--tasks {', '.join(unknown)}: unknown; the recipe's tasks are {', '.join(known)}")
    if any(rows) and len(tasks) != 1:
        problems.append("--train and --test give the rows of one task; name only that task in --tasks")
    if rank is not None and rank < 1:
        problems.append(f"--rank {rank}: expected at least 1")
    if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
        problems.append(f"--epochs {epochs:g}: expected a finite number above 0")
    problems += [
        f"--{key}: the shared state depends on the federation's settings, which a new client cannot change; leave "
        "it out"
        for key in fixed_keys(overrides, but="federation.local")
    ]
    if spec.ranks == "equal" and rank not in (None, of_all := _rank_of(members, config)):
        problems.append(f"--rank {rank}: rule {spec.name} needs the rank of all clients, {of_all}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _elsewhere(path: str, same: DataSource | None, other: DataSource | None) -> DataSource:
    """Rows from another file; the recipe's `where` and `limit` apply.

    Args:
        same: the recipe's source of this part; None if it has none: then the `where` of the `other` part applies.
    """
    if same is None:
        return DataSource(source=path, where=other.where if other is not None else {})
    format = None if Path(path).suffix.lower() in SUFFIXES else same.format
    return same.model_copy(update={"source": path, "format": format, "subset": None, "split": None})


def _recipe_of(
    config: FederatedConfig, name: str, tasks: Sequence[str], rows: tuple[str | None, str | None], rank: int
) -> FederatedConfig:
    """The recipe with the new client as its only one, and other rows for its task if they are given."""
    sections = [_with_rows(section, *rows) if section.name in tasks else section for section in config.tasks]
    client = ClientSection(name=name, tasks=list(tasks), rank=rank)
    federation = config.federation.model_copy(update={"clients": [client], "partition": None, "ranks": None})
    return config.model_copy(update={"tasks": sections, "federation": federation})


def _with_rows(section: TaskSection, train: str | None, test: str | None) -> TaskSection:
    given: dict[str, DataSource | None] = {}
    if train is not None:
        given["train"], given["test"] = _elsewhere(train, section.train, section.test), None
    if test is not None:
        given["test"] = _elsewhere(test, section.test, section.train)
    return section.model_copy(update=given)

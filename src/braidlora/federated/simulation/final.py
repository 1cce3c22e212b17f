"""A finished federation: its last round, and the clients' models after it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import CheckpointError, DataError
from braidlora.federated.protocol.client import first_state, received
from braidlora.federated.protocol.payload import make_payload
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.simulation.saved_rounds import SavedRound, client_state, newest_round
from braidlora.federated.site.clients import Client, load_clients
from braidlora.federated.site.host import Host
from braidlora.models.identity import base_differences
from braidlora.runs import MANIFEST, FederatedDirectory
from braidlora.tasks import LabelSpace, MixingSampler

_FIXED = ("adapter", "federation", "seed")  # sections of the recipe that the shared state depends on


def final_models(
    directory: FederatedDirectory, overrides: Sequence[str] = (), only: str | None = None
) -> Iterator[tuple[Client, Host]]:
    """Every client in the order of names, with a host in which its model is active: what `clients/NAME/adapter` holds.

    The host is the same for all, and loads the next client's model in the next iteration. Clients that were added later
    are not included.

    Args:
        directory: of a finished federation.
        overrides: `dotted.key=value` for its recipe, such as the path of its base here.
        only: the name of a client; default: all of them.

    Raises:
        CheckpointError: the federation is not finished, its last round is damaged or gone, or the base model differs.
        DataError: the clients' rows are not those it was trained on.
    """
    experiment, saved = last_round(directory)
    content = directory.read(directory.config.name)
    config = load_config(directory.config, overrides, FederatedConfig, content=content)
    clients = load_clients(config)
    if clients.report() != directory.read_json(directory.partition.name):
        raise DataError(
            f"{directory.path}: the clients' rows are no longer those of {directory.partition.name}; give the data it "
            "was trained on."
        )
    label_space = clients.label_space
    if label_space is not None and directory.labels.is_file():
        label_space = LabelSpace.parse(directory.labels, directory.read(directory.labels.name))
        tasks = clients.common + [task for client in clients.by_name.values() for task in client.tasks]
        label_space.check(tasks, str(directory.path))
    host = host_of(directory, config, label_space, experiment)
    for client in clients.by_name.values():
        if only not in (None, client.name):
            continue
        payload = make_payload(host.rule, saved.state, client, saved.round + 1)
        state = client_state(directory, saved, client.name) or first_state(host, client, experiment["id"])
        host.load(client.rank, client.scaling, received(host, client, payload, state))
        yield client, host


def last_round(directory: FederatedDirectory) -> tuple[dict[str, Any], SavedRound]:
    """The content of `experiment.json`, and the last round.

    Raises:
        CheckpointError: the federation is not finished, or the last round is damaged or gone.
    """
    if directory.state() != "finished":
        raise CheckpointError(
            f"{directory.path}: not a finished federation; `braidlora federate RECIPE --resume auto` finishes one."
        )
    experiment = directory.read_json(directory.experiment.name)
    saved = newest_round(directory, experiment["id"])
    if saved is None or saved.round != directory.read_json(directory.metrics.name)["rounds"]:
        raise CheckpointError(f"{directory.checkpoints}: the last round and its shared state are missing.")
    return experiment, saved


def trained_rows(
    experiment: Mapping[str, Any], saved: SavedRound, client: Client, host: Host
) -> tuple[set[int], int]:
    """Which of `host.rows(client)` the client has trained on, and in how many rounds that count.

    Args:
        experiment, saved: as of `last_round`.
        client, host: as of `final_models`.
    """
    training = host.config.training
    rows_per_step = training.batch_size * training.gradient_accumulation * experiment.get("processes", 1)
    seen: set[int] = set()
    rounds = 0
    for line in map(json.loads, saved.log):
        reply = line["clients"].get(client.name, {})
        if line["counted"] and "steps" in reply:
            seed = derive_seed(client.seed, line["round"])  # as `client_step` gives it to the training
            sampler = MixingSampler(host.rows(client), host.config.mixing, seed, rows_per_step)
            seen |= sampler.drawn_until(reply["steps"])
            rounds += 1
    return seen, rounds


def final_files(directory: FederatedDirectory, client: str) -> list[str]:
    """A client's results, for the federation's manifest: the adapter's own manifest and the predictions."""
    folder = directory.client(client)
    found = [folder / "adapter" / MANIFEST, *sorted((folder / "predictions").glob("*.jsonl"))]
    return [path.relative_to(directory.path).as_posix() for path in found]


def host_of(
    directory: FederatedDirectory,
    config: FederatedConfig,
    label_space: LabelSpace | None,
    experiment: dict[str, Any],
) -> Host:
    """A host on the federation's base model.

    Raises:
        CheckpointError: the base model is another one.
    """
    host = Host(config, label_space)
    content = directory.read(directory.config.name)
    own = load_config(directory.config, [], FederatedConfig, content=content).model
    same_form = (own.dtype, own.quantization) == (config.model.dtype, config.model.quantization)
    problems, notes = base_differences(experiment["base"], host.base, host.sampled, same_form=same_form)
    if problems:
        raise CheckpointError(
            f"{directory.path}: trained on a different base model.\n  "
            + "\n  ".join(problems)
            + "\nGive the one it was trained on with --model.path=PATH."
        )
    for note in notes:
        warnings.warn(f"{directory.path}: {note}", stacklevel=2)
    return host


def fixed_keys(overrides: Iterable[str], but: str = "") -> list[str]:
    """The overridden keys that a finished federation can no longer change, except those that begin with `but`."""
    keys = [override.partition("=")[0].removeprefix("--") for override in overrides]
    return [key for key in keys if key.partition(".")[0] in _FIXED and not (but and key.startswith(but))]

"""What a finished federation left: its last round, and the clients' models as they stand after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import CheckpointError, DataError
from braidlora.federated.protocol.client import Payload, first_state, received
from braidlora.federated.simulation.rounds import Committed, newest_round
from braidlora.federated.site.clients import Client, load_clients
from braidlora.federated.site.host import Host
from braidlora.federated.site.state import ClientState
from braidlora.models.identity import base_differences
from braidlora.runs import MANIFEST, FederatedDirectory
from braidlora.tasks import LabelSpace

_SETTLED = ("adapter", "federation", "seed")  # sections of the recipe that what is shared was made with


def final_models(
    directory: FederatedDirectory, overrides: Sequence[str] = ()
) -> Iterator[tuple[Client, Host]]:
    """Every client, in the order of names, with a host that wears its model: what `clients/NAME/adapter` holds.

    The host is the same for all and wears the next client's model as soon as that is asked for. Clients that were added
    later are not among them.

    Args:
        directory: of a finished federation.
        overrides: `dotted.key=value` for its recipe, such as where its base is here.

    Raises:
        CheckpointError: the federation is not finished, its last round is damaged or gone, or the base is another one.
        DataError: the clients' rows are not those it was trained on.
    """
    experiment, committed = last_round(directory)
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
        trained = LabelSpace.parse(directory.labels, directory.read(directory.labels.name))
        trained.check(
            clients.common + [task for client in clients.by_name.values() for task in client.tasks],
            str(directory.path),
        )
        label_space = trained
    host = host_of(directory, config, label_space, experiment)
    since, counted = committed.server["since"], committed.server["counted"]
    for client in clients.by_name.values():
        saved = committed.state(client.name)
        if saved is not None:
            state = ClientState.load(saved, client.name, experiment["id"])
        else:  # it never took part
            state = first_state(host, client, experiment["id"])
        whole = since > 0 and counted.get(client.name, 0) != since
        make = host.rule.catch_up if whole else partial(host.rule.payload_for, round=since)
        tensors = make(committed.shared, client.rank, client.scaling)
        payload = Payload(committed.round + 1, since, tensors, whole)
        host.wear(client.rank, client.scaling, received(host, client, payload, state))
        yield client, host


def last_round(directory: FederatedDirectory) -> tuple[dict[str, Any], Committed]:
    """What `experiment.json` says, and the last round.

    Raises:
        CheckpointError: the federation is not finished, or the last round is damaged or gone.
    """
    if directory.state() != "finished":
        raise CheckpointError(
            f"{directory.path}: no finished federation; `braidlora federate RECIPE --resume auto` finishes one."
        )
    experiment = directory.read_json(directory.experiment.name)
    committed = newest_round(directory, experiment["id"])
    if committed is None or committed.round != directory.read_json(directory.metrics.name)["rounds"]:
        raise CheckpointError(f"{directory.checkpoints}: the last round is gone, and with it what is shared.")
    return experiment, committed


def final_files(directory: FederatedDirectory, client: str) -> list[str]:
    """What stands of a client at the end, for the federation's manifest: the adapter's own manifest and the answers."""
    folder = directory.client(client)
    found = [folder / "adapter" / MANIFEST, *sorted((folder / "predictions").glob("*.jsonl"))]
    return [path.relative_to(directory.path).as_posix() for path in found]


def host_of(
    directory: FederatedDirectory,
    config: FederatedConfig,
    label_space: LabelSpace | None,
    experiment: dict[str, Any],
) -> Host:
    """A host on the federation's base.

    Raises:
        CheckpointError: the base is another one.
    """
    host = Host(config, label_space)
    content = directory.read(directory.config.name)
    own = load_config(directory.config, [], FederatedConfig, content=content).model
    same_form = (own.dtype, own.quantization) == (config.model.dtype, config.model.quantization)
    problems, notes = base_differences(experiment["base"], host.base, host.sampled, same_form=same_form)
    if problems:
        raise CheckpointError(
            f"{directory.path}: trained on another base.\n  "
            + "\n  ".join(problems)
            + "\nGive the base it was trained on with --model.path=PATH."
        )
    for note in notes:
        warnings.warn(f"{directory.path}: {note}", stacklevel=2)
    return host


def settled(overrides: Iterable[str], but: str = "") -> list[str]:
    """The overrides' keys that contradict what a federation was run with, those that begin with `but` apart."""
    keys = [override.partition("=")[0].removeprefix("--") for override in overrides]
    return [key for key in keys if key.partition(".")[0] in _SETTLED and not (but and key.startswith(but))]

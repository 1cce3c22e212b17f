"""The clients' models of a finished federation, one after the other, as they stand after its last round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import CheckpointError, DataError
from braidlora.federated.client import Payload, first_state, received
from braidlora.federated.clients import Client, load_clients
from braidlora.federated.host import Host
from braidlora.federated.rounds import CLIENTS, newest_round
from braidlora.federated.state import ClientState
from braidlora.runs import FederatedDirectory, read_json


def final_models(
    directory: FederatedDirectory, overrides: Sequence[str] = ()
) -> Iterator[tuple[Client, Host]]:
    """Every client, in the order of names, with a host that wears its model: what `clients/NAME/adapter` holds.

    The host is the same for all and wears the next client's model as soon as that is asked for.

    Args:
        directory: of a finished federation.
        overrides: `dotted.key=value` for its recipe, such as where its base is here.

    Raises:
        CheckpointError: the federation is not finished, its last round is damaged or gone, or the base is another one.
        DataError: the clients' rows are not those it was trained on.
    """
    if directory.state() != "finished":
        raise CheckpointError(
            f"{directory.path}: no finished federation; `braidlora federate RECIPE --resume auto` finishes one."
        )
    config = load_config(directory.config, overrides, FederatedConfig)
    experiment = read_json(directory.experiment)
    committed = newest_round(directory, experiment["id"])
    if committed is None:
        raise CheckpointError(
            f"{directory.checkpoints}: the last round is gone, and with it the clients' states."
        )
    clients = load_clients(config)
    if clients.report() != read_json(directory.partition):
        raise DataError(
            f"{directory.path}: the clients' rows are no longer those of {directory.partition.name}; give the data it "
            "was trained on."
        )
    host = Host(config, clients.label_space)
    if host.fingerprint != experiment["base"]:
        raise CheckpointError(
            f"{directory.path}: trained on base {experiment['base']}; {config.model.path} is {host.fingerprint}. Give "
            "the base it was trained on with --model.path=PATH."
        )
    for client in clients.by_name.values():
        path = committed.folder / CLIENTS / f"{client.name}.safetensors"
        if path.is_file():
            state = ClientState.load(path, client.name, experiment["id"])
        else:  # it never took part
            state = first_state(host, client, experiment["id"])
        since, counted = committed.server["since"], committed.server["counted"]
        whole = since > 0 and counted.get(client.name, 0) != since
        make = host.rule.catch_up if whole else host.rule.payload_for
        payload = Payload(
            committed.round + 1, since, make(committed.shared, client.rank, client.scaling), whole
        )
        host.wear(client.rank, client.scaling, received(host, client, payload, state))
        yield client, host

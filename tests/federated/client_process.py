"""One client of a federation, in a process of its own: its folder, a socket to the server, and nothing else."""

import os
from multiprocessing.connection import Client as Connection
from pathlib import Path

import torch

from braidlora.config import FederatedConfig, load_config
from braidlora.federated.protocol.client import client_step, first_state, received
from braidlora.federated.protocol.settle import counted_state
from braidlora.federated.protocol.wire import Message, pack, pack_message, unpack_payload
from braidlora.federated.site.export import save_client_adapter
from braidlora.federated.site.host import Host
from braidlora.federated.site.load import load_site
from braidlora.federated.site.store import ClientStore


def send(connection, message):
    for part in message:
        connection.send_bytes(part)


def receive(connection):
    return Message(connection.recv_bytes(), connection.recv_bytes())


def main(port, folder, name, dies_in):
    """Answer every payload with an update until the server says that it is the last; in round `dies_in`, die first."""
    torch.set_num_threads(1)
    folder = Path(folder)
    os.chdir(folder)
    config = load_config("recipe.yaml", [], FederatedConfig)
    site = load_site(config, name)
    host, client, store = Host(config, site.label_space), site.client, ClientStore(folder, name)
    with Connection(("127.0.0.1", port), authkey=b"test") as connection:
        connection.send([name, host.layers, pack(host.head)])
        while connection.recv_bytes() == b"train":
            payload = unpack_payload(receive(connection))
            result = client_step(host, client, payload, store)
            store.hold(result.state)
            if payload.round == dies_in:
                os._exit(9)  # trained, held, and not sent
            send(connection, pack_message(result.update))
        payload = unpack_payload(receive(connection))
        state = counted_state(store, payload) or first_state(host, client, payload.experiment)
        save_client_adapter(host, client, received(host, client, payload, state), folder / "adapter")
        connection.send_bytes(b"done")

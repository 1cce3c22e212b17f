"""Server and clients as processes that share no folder give the bytes of the simulation."""

import json
import shutil
from multiprocessing.connection import Listener

import client_process
import pytest
import yaml

from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import pack, pack_message, unpack, unpack_update
from braidlora.federated.simulation import runner
from braidlora.federated.simulation.driver import federate
from helpers.child import preloaded_context
from helpers.recipes import federated_recipe
from helpers.tiny_base import TASKS

ROUNDS, FAILS, MISSES = 5, 2, 4  # in round 2 two of three clients die, and round 4 does not reach `up`


class Clients:
    """The client processes, each with a folder of its own, and the server's ends of their sockets."""

    def __init__(self, folders):
        self.folders, self.listener = folders, Listener(("127.0.0.1", 0), authkey=b"test")
        self.context = preloaded_context()
        self.processes, self.sockets, self.facts = {}, {}, None

    def start(self, names, dies_in=0):
        for name in names:
            arguments = (self.listener.address[1], str(self.folders[name]), name, dies_in)
            self.processes[name] = self.context.Process(target=client_process.main, args=arguments)
            self.processes[name].start()
        for _ in names:
            connection = self.listener.accept()
            name, *self.facts = connection.recv()
            self.sockets[name] = connection

    def ask(self, name, what, payload):
        self.sockets[name].send_bytes(what)
        client_process.send(self.sockets[name], pack_message(payload))

    def close(self):
        self.listener.close()
        for process in self.processes.values():
            process.kill()
            process.join()


@pytest.fixture
def clients(tiny_base, rows, tmp_path):
    """A folder per client: the base model, a recipe, and the rows of its own task alone."""
    made = {}

    def make(**settings):
        for name in TASKS:
            folder = tmp_path / f"site-{name}"
            shutil.copytree(tiny_base, folder / "base")
            shutil.copy(rows / f"{name}.jsonl", folder)
            data = federated_recipe("base", folder, "unused", **settings)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
            made[name] = folder
        return Clients(made)

    return make


@pytest.mark.parametrize(
    "settings",
    [{"rule": "fed-alora", "optimizer_state": "keep"}, {"rule": "fed-alora-het", "ranks": [2, 4, 3]},
     {"rule": "flora", "ranks": [2, 4, 3]}],
    ids=lambda settings: settings["rule"],
)  # fmt: skip
def test_the_bytes_are_those_of_the_simulation(clients, make_config, monkeypatch, tmp_path, settings):
    settings = {"rounds": ROUNDS, "min_clients": 2, "training__threads": 1, **settings}
    processes = clients(**settings)
    try:
        shared = _server(make_config(**settings), processes)
    finally:
        processes.close()

    step = runner.client_step

    def failing(host, client, payload, *rest, **options):
        result = step(host, client, payload, *rest, **options)
        if (payload.round, client.name) in ((FAILS, "len"), (FAILS, "rev"), (MISSES, "up")):
            raise RuntimeError("it does not arrive")
        return result

    monkeypatch.setattr(runner, "client_step", failing)
    run = federate(make_config(**settings), progress=False).directory
    log = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["counted"] for line in log] == [True, False, True, True, True]
    newest = run / "rounds" / f"round-{ROUNDS}"
    assert json.loads((newest / "server.json").read_text())["counted"] == shared["counted"]
    assert (newest / "shared.safetensors").read_bytes() == shared["bytes"]
    for name, folder in processes.folders.items():
        ours = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        assert ours == (run / "clients" / name / "adapter" / "adapter_model.safetensors").read_bytes(), name
        kept = json.loads((newest / "server.json").read_text())["counted"][name]
        [ours] = (folder / "state").glob(f"*-{kept}")
        assert ours.is_dir()


def _server(config, processes):
    """The rounds of a server that knows names, ranks and scalings, and hears the rest over its sockets."""
    processes.start(["up"])
    processes.start(["len", "rev"], dies_in=FAILS)
    layers, head = processes.facts
    specs = {one.name: ClientSpec(one.name, one.rank, config.scaling_of(one)) for one in config.clients()}
    server = Server(config, specs, layers, unpack(head), experiment="x")
    for round in range(1, ROUNDS + 1):
        state = server.state()
        server = Server(config, specs, layers, unpack(head))  # as after a restart
        server.restore(state)
        reached = [name for name in server.sample(round) if (round, name) != (MISSES, "up")]
        server.open(round, server.sample(round))
        for name in reached:
            processes.ask(name, b"train", server.payload(name, round))
        for name in reversed(reached):
            try:
                server.take(unpack_update(client_process.receive(processes.sockets[name])))
            except EOFError:
                assert round == FAILS
        why_not = server.close()
        assert bool(why_not) == (round == FAILS), why_not
        if round == FAILS:
            processes.start(["len", "rev"])
    for name in TASKS:
        processes.ask(name, b"finish", server.payload(name, ROUNDS + 1))
        assert processes.sockets[name].recv_bytes() == b"done"
    return {"bytes": pack(server.state().shared), "counted": server.state().counted}

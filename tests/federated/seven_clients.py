"""Seven clients around a server, with random noise in the place of training."""

from types import SimpleNamespace

import torch

from braidlora.config import FederatedConfig
from braidlora.federated import AdaptedLayer, ClientUpdate
from braidlora.federated.protocol.client import first_state, received
from braidlora.federated.protocol.factors import CARRIED, split
from braidlora.federated.protocol.recipe import make_rule
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.state import ClientState
from braidlora.federated.site.clients import Client

COUNT = 7
LAYERS = [AdaptedLayer("m.0.q_proj", 9, 12), AdaptedLayer("m.1.v_proj", 10, 8)]
HEAD = "m.score.weight"


def recipe(rule, **options):
    """A checked recipe of seven clients, with a classification head."""
    options = dict(options)
    scalings = options.pop("scalings", None)
    names = [f"c{i}" for i in range(COUNT)]
    ranks = options.get("ranks", [4] * COUNT)
    clients = [{"name": name, "tasks": [name]} for name in names]
    if scalings:
        clients = [
            {**one, "alpha": scaling * rank}
            for one, scaling, rank in zip(clients, scalings, ranks, strict=True)
        ]
    return FederatedConfig.model_validate(
        {
            "model": {"path": "base"},
            "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "tasks": [{"name": name, "kind": "classify", "train": f"{name}.jsonl", "test": None} for name in names],
            "federation": {"rule": rule, "rounds": 2, "clients": clients, **options},
            "output": "run",
        }
    )  # fmt: skip


class Round:
    """Seven clients around a server, with random noise in the place of training."""

    def __init__(self, config):
        generator = torch.Generator().manual_seed(0)
        self.config, self.generator = config, generator
        head = {HEAD: torch.randn(3, 8, generator=generator)}
        self.host = SimpleNamespace(config=config, rule=make_rule(config, head), layers=LAYERS, head=head)
        self.clients = {
            section.name: Client(section.name, section.rank, config.scaling_of(section), 100 + i, [])
            for i, section in enumerate(config.clients())
        }
        self.states = {name: first_state(self.host, client, "x") for name, client in self.clients.items()}
        self.server = Server(config, self.clients, LAYERS, head)

    def run(self, number, spoil=lambda update: update):
        """Gives why the round does not count, and the updates by client; `spoil` is what becomes of them on the way."""
        server, rule = self.server, self.host.rule
        asked = server.sample(number)
        server.open(number, asked)
        updates, states = {}, {}
        for name in reversed(asked):  # in whatever order they come
            client, state = self.clients[name], self.states[name]
            reset = self.config.federation.state == "reset-each-round"
            tensors = received(self.host, client, server.payload(name, number), state, reset=reset)
            own = {
                n: t + 0.1 * torch.randn(t.shape, generator=self.generator)
                if split(n)[1] in rule.spec.at(number).trains or n == HEAD else t
                for n, t in tensors.items() if split(n)[1] not in CARRIED
            }  # fmt: skip
            dtype = getattr(torch, self.config.federation.upload_dtype)
            sent = {n: t.to(dtype) for n, t in rule.outgoing(own, number).items()}
            updates[name] = ClientUpdate(
                name,
                10 + 7 * int(name[1:]),
                sent,
                client.rank,
                client.scaling,
                number,
                1 + int(name[1:]) ** 2,
            )
            server.take(spoil(updates[name]))
            carried = {n: t for n, t in tensors.items() if split(n)[1] in CARRIED}
            states[name] = ClientState(name, "x", number, {**own, **carried})
        self.left_out = server.settle()
        why_not = server.close()
        if not why_not:
            self.states |= {name: state for name, state in states.items() if name not in self.left_out}
        return why_not, dict(sorted(updates.items()))

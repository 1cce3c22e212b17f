"""A federation whose sites are answerers in this process, each with a folder of its own."""

import json
from dataclasses import dataclass, field

import pytest

from braidlora.federated.flower.answerer import Answerer
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.grid_runner import GridRunner
from braidlora.federated.flower.hello import form_of_base
from braidlora.federated.flower.post import LATE, UNREACHABLE, Patience
from braidlora.federated.flower.roster import clients_of, make_roster
from braidlora.federated.flower.status import Status
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.load import load_site


class Notes(Status):
    """Keeps what it is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@dataclass
class Node:
    """What a grid says of a connected node."""

    last_activated_at: str = "first"


@dataclass
class LocalPost:
    """Stands in for `Post`: asks answerers in this process, through bytes, and in reverse order.

    `away` sites are not connected, `late` ones do not answer, and `spoil(name, envelope)` may change an answer.
    """

    answerers: dict
    away: set = field(default_factory=set)
    late: set = field(default_factory=set)
    spoil: object = None
    status: Notes = field(default_factory=Notes)
    patience: Patience = field(default_factory=lambda: Patience(deadline=5, absence=1, sites=0, poll=0.01))
    asked: list = field(default_factory=list)

    def look(self):
        return {name: Node() for name in self.answerers if name not in self.away}

    def check_stop(self):
        pass

    def ask(self, messages, group, deadline=None):
        for name, envelope in sorted(messages, reverse=True):
            self.asked.append((name, envelope.kind))
            if name in self.away:
                yield name, UNREACHABLE
            elif name in self.late:
                yield name, LATE
            else:
                answer = self.answerers[name].answer(name, _through_bytes(envelope))
                answer = self.spoil(name, answer) if self.spoil is not None else answer
                yield name, answer if answer.header is None else _through_bytes(answer)


def _through_bytes(envelope):
    return Envelope(envelope.kind, json.loads(json.dumps(envelope.header)), bytes(envelope.tensors))


class Federation:
    """Server and sites of a recipe; `run()` is `federate` over them."""

    def __init__(self, config, folder, **options):
        self.config, self.folder, self.options = config, folder, options
        names = sorted(client.name for client in config.clients())
        self.post = LocalPost({name: self.site(name) for name in names})

    def site(self, name, config=None, **options):
        config = config or self.config
        site = load_site(config, name)
        clients = Clients({name: site.client}, site.label_space, site.common)
        root = self.folder / f"site-{name}"
        return Answerer(config, clients, lambda _, experiment: root / experiment, secret=b"x" * 32, **options)

    def state(self, name):
        [found] = (self.folder / f"site-{name}").glob("*/state")
        return found

    def run(self, config=None, *, accept_fresh=(), **options):
        config = config or self.config

        def connect(config, directory, stop):
            clients = clients_of(config)
            runner = GridRunner(
                self.post, config, clients, remote=True, accept_fresh=accept_fresh, directory=directory
            )
            runner.connect(self.options.get("needed", 1))
            rows = {name: one.rows for name, one in runner.welcomes.items()}
            if options.get("resume") and directory.partition.is_file():
                rows = {
                    name: one["tasks"] for name, one in directory.read_json("partition.json").items()
                } | rows
            bases = {name: form_of_base(name, one) for name, one in runner.welcomes.items()}
            first = next(iter(runner.welcomes.values()))
            return make_roster(clients, rows, first.labels, first.common, bases), runner

        return federate(config, connect=connect, progress=False, **options).directory


@pytest.fixture
def federation(make_config, tmp_path):
    """`federation(rule="fed-alora", …)`: sites in folders of their own, of settings or of a whole recipe."""

    def make(config=None, needed=1, **settings):
        config = config or make_config(training__threads=1, **settings)
        return Federation(config, tmp_path, needed=needed)

    return make

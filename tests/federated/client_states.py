"""Clients' states: where a run directory has them, and a store in memory."""

import json

from braidlora.federated.protocol.payload import Payload


def state_path(run, client, round):
    """The file of a client's state of this round of its own."""
    [path] = (run / "clients" / client / "state").glob(f"*-{round}/state.safetensors")
    return path


def state_paths(run, round):
    """By client, the states that a committed round builds on."""
    counted = json.loads((run / "rounds" / f"round-{round}" / "server.json").read_text())["counted"]
    return {client: state_path(run, client, number) for client, number in counted.items()}


class MemoryStore:
    """A client's states in memory; with `state` as the committed one."""

    def __init__(self, client, state=None):
        self.client, self.states, self.pending = client, {}, 0
        if state is not None and state.round:
            self.states[state.round] = state
        self.committed = max(self.states, default=0)

    def load(self, round, experiment):
        return self.states[round]

    def hold(self, state):
        self.pending, self.states[state.round] = state.round, state

    def commit(self):
        self.committed, self.pending = self.pending, 0

    def drop(self):
        del self.states[self.pending]
        self.pending = 0


def payload_of(round, tensors=None, *, counted=0, shared=0):
    return Payload(round, shared, counted, tensors or {}, experiment="x")

"""A client's step alone: it depends on its arguments, and on nobody who used the base before."""

import json

import numpy as np
import pytest
import torch
from client_states import MemoryStore, payload_of
from peft import get_peft_model_state_dict

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.client import client_step, first_state, received
from braidlora.federated.protocol.factors import split
from braidlora.federated.protocol.state import ClientState
from braidlora.federated.protocol.wire import pack
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.host import Host
from braidlora.federated.site.local_training import ClientTrainer
from braidlora.federated.site.store import ClientStore, state_bytes
from helpers.tiny_base import TASKS


def step(host, clients, name, round=1, state=None, payload=None):
    client = clients.by_name[name]
    payload = payload or payload_of(round, counted=state.round if state is not None else 0)
    return client_step(host, client, payload, MemoryStore(name, state))


def all_bytes(result):
    return pack(result.update.tensors), pack(result.state.tensors), pack(result.state.optimizer), result.loss


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "fed-alora-het", "ranks": [2, 4, 3]},
        {"rule": "flora", "ranks": [2, 4, 4]},
        {"rule": "ffa-lora", "optimizer_state": "keep"},
        {"rule": "fedsa-lora", "kind": "classify", "share_head": True},
    ],
    ids=lambda settings: settings["rule"],
)
def test_a_step_alone_is_the_step_among_others(make_config, settings):
    """Byte for byte, dropout included: others trained in the same base in between, one of them to its ruin."""
    config = make_config(**settings)
    clients = load_clients(config)
    alone = Host(config, clients.label_space)
    first = step(alone, clients, "rev")
    second = step(alone, clients, "rev", 2, first.state)
    host = Host(config, clients.label_space)
    step(host, clients, "up")
    with torch.no_grad():
        for parameter in host.parameters().values():
            parameter.fill_(float("nan"))
    among_first = step(host, clients, "rev")
    step(host, clients, "len")
    torch.manual_seed(99)
    torch.rand(7)
    among_second = step(host, clients, "rev", 2, among_first.state)
    assert all_bytes(among_first) == all_bytes(first)
    assert all_bytes(among_second) == all_bytes(second)
    assert all_bytes(second) != all_bytes(first)


def test_the_base_is_never_touched(make_config):
    config = make_config(rule="flora")
    clients = load_clients(config)
    host = Host(config, None)
    base = {n: p.clone() for n, p in host.model.named_parameters() if "lora_" not in n}
    for name in TASKS:
        step(host, clients, name)
    for name, parameter in host.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name]), name


def test_slots_are_what_peft_saves(make_config):
    config = make_config(kind="classify", rule="flora", ranks=[2, 4, 3])
    clients = load_clients(config)
    host = Host(config, clients.label_space)
    for client in clients.by_name.values():
        state = first_state(host, client, "x")
        host.load(client.rank, client.scaling, state.tensors)
        saved = get_peft_model_state_dict(host.model, adapter_name=f"rank{client.rank}_scaling2")
        assert saved.keys() == host.read().keys() == state.tensors.keys()
        for name, tensor in host.read().items():
            assert torch.equal(tensor, saved[name])
            assert torch.equal(tensor, state.tensors[name])


def test_clients_start_from_one_draw_or_from_their_own(make_config):
    """Shared: every A is the beginning of the largest, every M a multiple of the largest M's first columns."""
    for init in ("shared", "independent"):
        config = make_config(rule="fed-alora-het", ranks=[2, 4, 3], client_init=init)
        clients = load_clients(config)
        host = Host(config, None)
        states = {name: first_state(host, clients.by_name[name], "x").tensors for name in TASKS}
        layer = f"{host.layers[0].name}.factoredlora"
        A = {name: states[name][f"{layer}_A.weight"] for name in TASKS}
        M = {name: states[name][f"{layer}_M.weight"] for name in TASKS}
        alike = torch.equal(A["len"], A["rev"][:2])
        assert alike == torch.allclose(M["len"] * 2**0.5, M["rev"][:, :2] * 4**0.5, atol=1e-6)
        assert alike == (init == "shared")
        for name, rank in zip(TASKS, (2, 4, 3), strict=True):
            # Kaiming-uniform(a = √5) is U(−1/√fan_in, 1/√fan_in).
            for factor, fan_in in (("A", 32), ("M", rank), ("B1", 16)):
                drawn = states[name][f"{layer}_{factor}.weight"]
                assert drawn.abs().max() <= 1 / fan_in**0.5
                assert drawn.std() == pytest.approx(1 / (3 * fan_in) ** 0.5, rel=0.35)
            assert not states[name][f"{layer}_B2.weight"].any()
            assert not states[name][f"{layer}_base.weight"].any()


def test_reset_goes_back_to_the_start_and_persist_does_not(make_config):
    for mode in ("persist", "reset-each-round"):
        config = make_config(rule="fed-alora", state=mode)
        clients = load_clients(config)
        host, client = Host(config, None), clients.by_name["up"]
        first = step(host, clients, "up")
        payload = payload_of(2, {n: torch.ones_like(t) for n, t in first.update.tensors.items()}, counted=1)
        start = received(host, client, payload, first.state, reset=mode == "reset-each-round")
        fresh = first_state(host, client, "x").tensors
        for name, tensor in start.items():
            if split(name)[1] == "lora_B":
                assert torch.equal(tensor, torch.ones_like(tensor))
            else:
                assert torch.equal(tensor, fresh[name]) == (mode == "reset-each-round")
                assert torch.equal(tensor, first.state.tensors[name]) == (mode == "persist")


def test_a_kept_optimizer_runs_on_through_the_rounds(make_config, monkeypatch):
    """The schedule is one over all rounds, and Adam counts all its steps; restarted, each round has its own."""
    rates = []
    original = ClientTrainer.training_step

    def watched(self, *args, **kwargs):
        rates.append(self._get_learning_rate())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClientTrainer, "training_step", watched)
    one_schedule = [0.05 * (9 - i) / 9 for i in range(9)]
    own_schedules = [0.05 * (3 - i) / 3 for i in range(3)] * 3
    for mode, expected in (("keep", one_schedule), ("restart", own_schedules)):
        rates.clear()
        config = make_config(rule="local", rounds=3, optimizer_state=mode, local={"steps": 3})
        clients = load_clients(config)
        host = Host(config, None)
        state = None
        for round in (1, 2, 3):
            state = step(host, clients, "up", round, state).state
        np.testing.assert_allclose(rates, expected)
        steps = {float(t) for n, t in state.optimizer.items() if n.startswith("step/")}
        assert steps == ({9.0} if mode == "keep" else set())


def test_moments_of_what_restarts_restart_too(make_config):
    config = make_config(rule="fed-alora-het", optimizer_state="keep", local={"steps": 2}, rounds=2)
    clients = load_clients(config)
    host = Host(config, None)
    first = step(host, clients, "up")
    second = step(host, clients, "up", 2, first.state)
    steps = {n: float(t) for n, t in second.state.optimizer.items() if n.startswith("step/")}
    for name, count in steps.items():
        assert count == (2 if split(name)[1] in ("factoredlora_B1", "factoredlora_B2") else 4), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_uploads_travel_in_16_bits(make_config, dtype):
    config = make_config(upload_dtype=dtype)
    clients = load_clients(config)
    host = Host(config, None)
    result = step(host, clients, "up")
    for name, tensor in result.update.tensors.items():
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor.float(), result.state.tensors[name], atol=1e-3, rtol=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in result.state.tensors.values())


def test_a_head_stays_unless_it_is_shared(make_config):
    for share in (False, True):
        config = make_config(kind="classify", share_head=share)
        clients = load_clients(config)
        host = Host(config, clients.label_space)
        assert host.head, "a classifier has a head"
        result = step(host, clients, "up")
        assert set(host.head) <= set(result.state.tensors)
        assert any(not torch.equal(result.state.tensors[name], tensor) for name, tensor in host.head.items())
        assert (set(host.head) <= set(result.update.tensors)) == share


def test_a_round_that_did_not_count_leaves_no_trace(make_config):
    """In round 2 a client starts from its first state if round 1 did not count, and from that of round 1 if it did."""
    config = make_config(rule="fed-alora", optimizer_state="keep")
    clients = load_clients(config)
    host, client = Host(config, None), clients.by_name["up"]
    store = MemoryStore("up")
    first = client_step(host, client, payload_of(1), store)
    fresh = client_step(host, client, payload_of(2), MemoryStore("up"))
    store.hold(first.state)
    assert all_bytes(client_step(host, client, payload_of(2), store)) == all_bytes(fresh)
    assert (store.committed, store.pending) == (0, 0)
    store.hold(first.state)
    second = client_step(host, client, payload_of(2, counted=1), store)
    assert (store.committed, store.pending) == (1, 0)
    assert all_bytes(second) == all_bytes(step(host, clients, "up", 2, first.state)) != all_bytes(fresh)


def test_a_state_of_another_client_or_model_is_refused(make_config):
    config = make_config()
    clients = load_clients(config)
    host = Host(config, None)
    state = step(host, clients, "up", round=2).state
    with pytest.raises(CheckpointError, match="of client 'up'; expected 'rev'"):
        client_step(host, clients.by_name["rev"], payload_of(3, counted=2), MemoryStore("up", state))
    wrong = ClientState("up", "x", 1, {n: t[:, :1] for n, t in state.tensors.items()})
    with pytest.raises(CheckpointError, match=r"has shape \(4, 1\), expected \(4, 32\)"):
        step(host, clients, "up", 2, wrong)


def test_the_states_file_says_whose_it_is(make_config, tmp_path):
    from safetensors import safe_open

    state = ClientState(
        "up", "x", 3, {"a.lora_A.weight": torch.ones(2, 2)}, {"step/a.lora_A.weight": torch.ones(())}
    )
    ClientStore(tmp_path, "up").hold(state)
    path = tmp_path / "state" / "pending-3" / "state.safetensors"
    assert path.read_bytes() == state_bytes(state)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["braidlora"])
        assert sorted(file.keys()) == ["a.lora_A.weight", "optimizer:step/a.lora_A.weight"]
    assert header == {"client": "up", "experiment": "x", "round": 3}

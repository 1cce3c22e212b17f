"""Whole federations by all rules: the shared state, the bytes, the adapters, the records."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from client_states import payload_of, state_paths
from peft import PeftModel
from safetensors.torch import load_file, save
from synthetic import PRODUCTS, Client, expected_shared, get
from transformers import AutoModelForCausalLM

from braidlora.errors import ConfigError
from braidlora.federated import RULE_NAMES, get_rule
from braidlora.federated.protocol.client import first_state, received
from braidlora.federated.protocol.communication import traffic
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.host import Host
from braidlora.federated.site.store import ClientStore
from braidlora.plan.layers import adapted_layers
from braidlora.safetensors_size import serialized_bytes
from helpers.tiny_base import TASKS

MIXED = {"zero-padding", "flora", "flexlora", "raflora", "fed-alora-het", "local"}
ROWS = {"len": 8, "rev": 13, "up": 19}  # after the split


def ranks_of(rule):
    return [2, 4, 3] if rule in MIXED else [4, 4, 4]


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def states(directory, round):
    return {name: load_file(path) for name, path in state_paths(directory, round).items()}


@pytest.fixture(scope="module")
def finished():
    return {}


@pytest.fixture(params=RULE_NAMES)
def run(request, finished, make_config, tmp_path_factory):
    """A federation of three clients and two rounds, one per rule; run once for all tests."""
    rule = request.param
    if rule not in finished:
        config = make_config(rule=rule, ranks=ranks_of(rule), rounds=2, evaluate_every=1)
        config = config.model_copy(update={"output": str(tmp_path_factory.mktemp(rule) / "run")})
        finished[rule] = (config, federate(config, progress=False))
    return finished[rule]


def test_the_shared_state_is_what_the_rule_makes_of_the_clients(run):
    """Each round's shared state against the formulas in float64, from the states that the clients keep."""
    config, result = run
    rule = config.federation.rule
    if rule == "local":
        assert not list(result.directory.glob("rounds/*/shared.safetensors"))
        return
    shared = {
        round: load_file(result.directory / "rounds" / f"round-{round}" / "shared.safetensors")
        for round in (1, 2)
    }
    for round in (1, 2):
        clients = [
            Client(name, ROWS[name], rank, 2.0, states(result.directory, round)[name])
            for name, rank in zip(TASKS, ranks_of(rule), strict=True)
        ]
        for client in clients:  # the stack that flora's clients carry is no part of their update
            client.state = {n: t for n, t in client.state.items() if "carried" not in n}
        if rule == "rolora":
            trained = get_rule(rule).spec.at(round).uploads
            whole = expected_shared("fedit", clients)
            kept = {name: t for name, t in shared[round].items() if name.split(".")[-2] not in trained}
            assert all(torch.equal(t, shared[1][name]) for name, t in kept.items())
            expected = {name: t for name, t in whole.items() if name not in kept}
        else:
            expected = expected_shared(rule, clients, shared.get(round - 1))
        for name, value in expected.items():
            if rule in PRODUCTS:
                got = get(shared[round], name, "lora_B") @ get(shared[round], name, "lora_A")
            else:
                got = shared[round][name].double().numpy()
            if rule in ("flexlora", "raflora"):  # exact up to the cut to the largest rank
                U, S, Vh = np.linalg.svd(value)
                value = (U[:, :4] * S[:4]) @ Vh[:4]
            np.testing.assert_allclose(got, value, atol=2e-6, rtol=0)


def test_what_travelled_is_what_was_planned(run):
    """Serialized bytes of every client and round against the plan from shapes alone."""
    config, result = run
    layers = adapted_layers(config.model.path, config.adapter.target_modules)
    rule = get_rule(config.federation.rule)
    planned = traffic(rule, layers, ranks_of(config.federation.rule))
    for line in (
        lines(result.directory) if not rule.spec.turns else ()
    ):  # whose turns add up to the plan below
        for plan, name in zip(planned, TASKS, strict=True):
            # Nothing is shared before the first round: clients start from the recipe's seed.
            down = 0 if line["round"] == 1 else plan.down_bytes
            assert (line["clients"][name]["up"], line["clients"][name]["down"]) == (plan.up_bytes, down), name
    metrics = result.metrics
    assert metrics["bytes"]["up"] == 2 * sum(plan.up_bytes for plan in planned)
    if rule.spec.turns:
        planned_down = [serialized_bytes(rule.download_shapes(layers, 4, [4] * 3, 1), torch.float32)] * 3
    else:
        planned_down = [plan.down_bytes for plan in planned]
    assert metrics["bytes"]["down"] == sum(planned_down)
    assert metrics["clients"]["up"]["bytes"]["up"] == 2 * planned[2].up_bytes


def test_the_upload_as_written_has_these_bytes(run):
    """The plan's formula against safetensors itself, on the tensors that the client sent."""
    config, result = run
    sent = get_rule(config.federation.rule).outgoing(states(result.directory, 2)["rev"], 2)
    sent = {name: tensor for name, tensor in sorted(sent.items()) if "carried" not in name}
    assert lines(result.directory)[1]["clients"]["rev"]["up"] == (len(save(sent)) if sent else 0)


def test_the_adapters_are_the_models_that_were_scored(run):
    """Plain PEFT loads them, and gives the logits of the aggregated model as the clients' side makes it."""
    config, result = run
    rule = config.federation.rule
    clients, host = load_clients(config), Host(config, None)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    shared = result.directory / "rounds" / "round-2" / "shared.safetensors"
    server_rule = get_rule(rule)
    tokens = torch.arange(4, 24)[None]
    for name, client in clients.by_name.items():
        experiment = json.loads((result.directory / "experiment.json").read_text())["id"]
        state = ClientStore(result.directory / "clients" / name, name).load(2, experiment)
        tensors = load_file(shared) if shared.exists() else {}
        payload = payload_of(
            3, server_rule.payload_for(tensors, client.rank, client.scaling), shared=2, counted=2
        )
        payload = dataclasses.replace(payload, weight=ROWS[name] / sum(ROWS.values()))
        host.load(client.rank, client.scaling, received(host, client, payload, state))
        unadapted = base(tokens).logits
        model = PeftModel.from_pretrained(
            copy.deepcopy(base), result.directory / "clients" / name / "adapter"
        ).eval()
        with torch.no_grad():
            ours, theirs = host.model.eval()(tokens).logits, model(tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert not torch.allclose(ours, unadapted, atol=1e-4)


def test_records_and_metrics_agree(run):
    config, result = run
    saved = json.loads((result.directory / "metrics.json").read_text())
    assert saved == result.metrics
    assert (saved["rule"], saved["rounds"], saved["skipped"]) == (config.federation.rule, 2, [])
    first, second = lines(result.directory)
    for name in TASKS:
        one = saved["clients"][name]
        assert set(second["clients"][name]) >= {"before", "after", "aggregated", "loss", "steps", "rows"}
        # A client starts the second round with the model that the first one ended with.
        assert second["clients"][name]["before"] == first["clients"][name]["aggregated"]
        assert (one["before"], one["after"]) == (
            second["clients"][name]["before"],
            second["clients"][name]["after"],
        )
        assert one["mean"] == one["aggregated"] == second["clients"][name]["aggregated"]
        assert one["tasks"][name]["n"] == {"len": 2, "rev": 3, "up": 5}[name]
        predictions = (result.directory / "clients" / name / "predictions" / f"{name}.jsonl").read_text()
        scores = [json.loads(line)["score"] for line in predictions.splitlines()]
        assert sum(scores) / len(scores) == one["tasks"][name]["score"]
    losses = [sum(line["clients"][name]["loss"] for name in TASKS) for line in (first, second)]
    assert losses[1] < losses[0]
    means = [saved["clients"][name]["mean"] for name in TASKS]
    assert saved["mean"] == pytest.approx(sum(means) / 3)
    assert saved["worst"] == min(means)
    assert saved["delta_m"] is None
    assert "--local-run" in saved["delta_m_reason"]


def test_only_the_allowed_factors_are_frozen_or_moved(run):
    """What a rule says is trained moves, what is frozen stays as it was drawn."""
    config, result = run
    rule = get_rule(config.federation.rule)
    clients, host = load_clients(config), Host(config, None)
    for name, client in clients.by_name.items():
        start = first_state(host, client, "x").tensors
        end = states(result.directory, 2)[name]
        for key, tensor in start.items():
            factor = key.split(".")[-2]
            if factor not in (*rule.spec.trains, "factoredlora_base", "rest_A", "rest_B"):
                assert torch.equal(tensor, end[key]), key
            elif factor in rule.spec.trains:
                assert not torch.equal(tensor, end[key]), key


def test_local_clients_are_where_they_would_be_alone(finished, make_config, tmp_path):
    """Byte for byte: no tensor, optimizer state or random number leaks from one client to another."""
    config = make_config("together", rule="local", ranks=[2, 4, 3])
    federate(config, progress=False)
    for name, rank in zip(TASKS, [2, 4, 3], strict=True):
        others = [other for other in TASKS if other != name]
        alone = make_config(
            f"alone-{name}",
            rule="local",
            clients=[{"name": name, "tasks": [name], "rank": rank}],
            common_test=others,
        )
        federate(alone, progress=False)
        for part in ("adapter/adapter_model.safetensors", f"predictions/{name}.jsonl"):
            path = f"clients/{name}/{part}"
            assert (tmp_path / f"alone-{name}" / path).read_bytes() == (
                tmp_path / "together" / path
            ).read_bytes()


def test_a_cutoff_beyond_the_positions_of_the_base_is_refused_before_anything_is_written(
    make_config, tmp_path
):
    with pytest.raises(ConfigError, match=r"prompt\.cutoff: 100000 tokens"):
        federate(make_config(prompt__cutoff=100_000), progress=False)
    assert not (tmp_path / "run" / "rounds").exists()


def test_scalings_that_differ_in_the_last_digit_are_adapters_of_their_own(make_config, tmp_path):
    """9.6 / 6 is 1.5999999999999999, and 1.6 · 6 / 6 is 1.6000000000000003; the guard takes them for one."""
    settings = {"adapter__r": 10, "adapter__lora_alpha": 16, "rule": "fedit"}
    clients = [{"name": name, "tasks": [name], "rank": 6} for name in TASKS]
    given = [clients[0] | {"alpha": 9.6}, *clients[1:]]
    result = federate(make_config(rounds=1, clients=given, **settings), progress=False)
    [line] = [json.loads(text) for text in (result.directory / "rounds.jsonl").read_text().splitlines()]
    assert "failed" not in line
    for name in TASKS:
        path = result.directory / "clients" / name / "adapter" / "adapter_config.json"
        assert json.loads(path.read_text())["lora_alpha"] == pytest.approx(9.6)

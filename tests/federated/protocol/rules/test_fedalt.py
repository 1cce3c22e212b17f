"""FedALT: what a client receives is the mean of the others, and what it trains next to it is its own."""

import dataclasses

import numpy as np
import pytest
import torch
from seven_clients import LAYERS, Round, recipe

from braidlora.errors import ConfigError
from braidlora.federated import get_rule
from braidlora.federated.protocol.client import received
from braidlora.federated.protocol.robust import CoordinateMedian

A, B = (f"{LAYERS[0].name}.lora_{factor}.weight" for factor in "AB")


def weights(updates, config):
    number = {"rows": "num_examples", "steps": "steps"}[config.federation.weights]
    return {name: float(getattr(one, number)) for name, one in updates.items()}


def rest_of(federation, name, round):
    client, state = federation.clients[name], federation.states[name]
    return received(federation.host, client, federation.server.payload(name, round), state)


@pytest.mark.parametrize(
    "options", [{}, {"weights": "steps"}, {"upload_dtype": "bfloat16"}, {"share_head": True}]
)
def test_a_client_that_took_part_receives_the_mean_of_the_others(options):
    config = recipe("fedalt", **options)
    federation = Round(config)
    for round in (1, 2):
        why_not, updates = federation.run(round)
        assert why_not == ""
        n = weights(updates, config)
        for name in updates:
            got = rest_of(federation, name, round + 1)
            others = [one for one in updates if one != name]
            for own in (A, B):
                mean = sum(n[one] * updates[one].tensors[own].double() for one in others)
                mean = mean / sum(n[one] for one in others)
                rest = got[own.replace("lora_", "rest_")].double()
                torch.testing.assert_close(rest, mean, atol=1e-6, rtol=1e-5)
                assert torch.equal(got[own], federation.states[name].tensors[own]), "its own stays"


def test_a_client_that_did_not_take_part_receives_the_mean_of_those_that_did():
    federation = Round(recipe("fedalt", sample={"number": 5}))
    _, updates = federation.run(1)
    absent = sorted(federation.clients.keys() - updates.keys())
    n = {name: one.num_examples for name, one in updates.items()}
    mean = sum(n[one] * updates[one].tensors[B].double() for one in updates) / sum(n.values())
    for name in absent:
        got = rest_of(federation, name, 2)[B.replace("lora_", "rest_")]
        torch.testing.assert_close(got.double(), mean, atol=1e-6, rtol=1e-5)


def test_the_only_client_of_a_round_keeps_the_rest_that_it_has():
    federation = Round(recipe("fedalt", sample={"number": 1}))
    federation.run(1)
    [name] = federation.server.sample(1)
    before = federation.states[name].tensors
    got = rest_of(federation, name, 2)
    assert all(torch.equal(got[n], before[n]) for n in before if "rest_" in n)


def test_all_clients_of_a_round_are_sent_the_same_bytes():
    federation = Round(recipe("fedalt"))
    federation.run(1)
    one, other = (federation.server.payload(name, 2) for name in ("c0", "c1"))
    assert one.tensors is other.tensors
    assert sum(federation.server.payload(name, 2).weight for name in federation.clients) == pytest.approx(1.0)


def test_a_robust_aggregate_has_no_part_to_take_out():
    with pytest.raises(ConfigError, match=r"cannot use CoordinateMedian: a client subtracts its own part"):
        get_rule("fedalt", aggregator=CoordinateMedian())


def test_a_lone_client_is_refused():
    config = recipe("fedit")
    data = config.model_dump(mode="json")
    data["federation"] |= {"rule": "fedalt", "clients": data["federation"]["clients"][:1]}
    data["tasks"] = data["tasks"][:1]
    with pytest.raises(ValueError, match=r"fedalt needs at least 2 clients; there is 1"):
        type(config).model_validate(data)


def test_the_layer_is_the_formula():
    """In float64: W0 x + s (w₁ Bᵢ Aᵢ + w₂ B_R A_R) x, with gradients for all but the rest."""
    from peft import get_peft_model
    from torch import nn

    from braidlora.federated.site import pair

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False)).double()
    config = pair.pair_config(r=3, lora_alpha=6, target_modules=["0"], init_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    pair.divide(model, "default")
    own = {
        pair.tensor_name(n.replace(".default", "")): p
        for n, p in model.named_parameters()
        if "braidlora" in n
    }
    factor = {name.split(".")[-2]: parameter for name, parameter in own.items()}
    assert factor.keys() == {"lora_A", "lora_B", "rest_A", "rest_B", "mixer"}
    x = torch.randn(5, 12, dtype=torch.float64)
    w = torch.softmax(x @ factor["mixer"].T, -1)
    parts = [x @ factor[f"{one}_A"].T @ factor[f"{one}_B"].T for one in ("lora", "rest")]
    wanted = x @ model.base_model.model[0].base_layer.weight.T
    wanted = wanted + 2.0 * (w[:, :1] * parts[0] + w[:, 1:] * parts[1])
    factor["rest_A"].requires_grad_(False)
    factor["rest_B"].requires_grad_(False)
    got = model(x)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    got.square().sum().backward()
    assert {name for name, one in factor.items() if one.grad is not None} == {"lora_A", "lora_B", "mixer"}
    state = {name: parameter.detach() for name, parameter in own.items()}
    merged = pair.joined(state)
    assert {name.split(".")[-2]: tuple(t.shape) for name, t in merged.items()} == {
        "braidlora_A": (6, 12), "braidlora_B": (10, 6), "braidlora_router": (2, 12),
    }  # fmt: skip
    np.testing.assert_array_equal(
        merged[next(n for n in merged if "_A" in n)][3:], state[next(n for n in state if "rest_A" in n)]
    )


def test_a_payload_without_a_weight_holds_no_part():
    """As an older server or a robust aggregator sends it."""
    federation = Round(recipe("fedalt"))
    federation.run(1)
    payload = dataclasses.replace(federation.server.payload("c0", 2), weight=None)
    got = received(federation.host, federation.clients["c0"], payload, federation.states["c0"])
    name = B.replace("lora_", "rest_")
    assert torch.equal(got[name], federation.server.state().shared[name])

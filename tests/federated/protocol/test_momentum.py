"""FedAvgM against its formulas in float64, and what it means under each kind of rule."""

import numpy as np
import pytest
import torch
from synthetic import clients, get, layers, run

from braidlora.federated import get_rule
from braidlora.federated.protocol.momentum import advanced

SHAPES = [(14, 12), (9, 16)]


def random_state(names, generator):
    return {name: torch.randn(4, 3, generator=generator, dtype=torch.float64) for name in names}


@pytest.mark.parametrize(("beta", "eta"), [(0.9, 1.0), (0.0, 0.3), (0.5, 2.0)])
def test_formula(beta, eta):
    generator = torch.Generator().manual_seed(0)
    names = ["l.lora_A.weight", "l.lora_B.weight", "score.weight"]
    shared, velocity = random_state(names, generator), {}
    theta = {name: t.numpy().copy() for name, t in shared.items()}
    v = dict.fromkeys(names, 0.0)
    for _ in range(4):
        mean = random_state(names, generator)
        shared, velocity = advanced(shared, mean, velocity, momentum=beta, learning_rate=eta)
        for name in names:
            v[name] = beta * v[name] + theta[name] - mean[name].numpy()
            theta[name] = theta[name] - eta * v[name]
            np.testing.assert_allclose(shared[name], theta[name], atol=1e-12)
            np.testing.assert_allclose(velocity[name], v[name], atol=1e-12)


def test_without_momentum_and_at_rate_1_it_is_the_aggregate():
    generator = torch.Generator().manual_seed(0)
    before, mean = (random_state(["l.lora_B.weight"], generator) for _ in range(2))
    shared, _ = advanced(before, mean, {}, momentum=0.0, learning_rate=1.0)
    torch.testing.assert_close(shared, mean, atol=1e-15, rtol=0)


def test_what_has_no_start_or_another_shape_is_the_aggregate():
    mean = {"l.lora_A.weight": torch.ones(3, 5), "l.lora_B.weight": torch.ones(5, 3)}
    shared, velocity = advanced(
        {"l.lora_A.weight": torch.zeros(2, 5)}, mean, {}, momentum=0.9, learning_rate=0.5
    )
    assert all(torch.equal(shared[name], mean[name]) for name in mean)
    assert velocity == {}


def test_with_a_frozen_a_it_is_momentum_on_the_effective_update():
    """ΔW is linear in B, so FFA-LoRA's server could as well move ΔW."""
    rule = get_rule("ffa-lora")
    shared, velocity, W, v = {}, {}, {}, {}
    for seed in range(3):
        made = clients("ffa-lora", [3, 3, 3], SHAPES, seed=seed)
        A = clients("ffa-lora", [3], SHAPES)[0].state
        shared = shared or {n: torch.zeros_like(t) for n, t in A.items() if "lora_B" in n}
        mean = run(rule, made, shared)
        shared, velocity = advanced(shared, mean, velocity, momentum=0.7, learning_rate=1.0)
        for layer in layers(A):
            target = get(mean, layer, "lora_B") @ get(A, layer, "lora_A")
            v[layer] = 0.7 * v.get(layer, 0.0) + W.get(layer, 0.0) - target
            W[layer] = W.get(layer, 0.0) - v[layer]
            got = get(shared, layer, "lora_B") @ get(A, layer, "lora_A")
            np.testing.assert_allclose(got, W[layer], atol=1e-11)


def test_the_factor_of_the_other_turn_does_not_drift():
    """Under RoLoRA a round moves one factor; the other one and its v wait for their turn."""
    rule = get_rule("rolora")
    made = clients("rolora", [3, 3], SHAPES)
    shared = {n: torch.randn_like(t) for n, t in made[0].state.items()}
    velocity = {n: torch.randn_like(t) for n, t in made[0].state.items()}
    for round, moving in ((1, "lora_B"), (2, "lora_A")):
        rule.start(shared, round)
        for client in made:
            rule.add(client.update(rule, round=round))
        settled = rule.settled(round)
        after, v = advanced(shared, rule.finish(), velocity, momentum=0.9, learning_rate=1.0, settled=settled)
        for name, tensor in after.items():
            still = moving not in name
            assert torch.equal(tensor, shared[name]) == still
            assert torch.equal(v[name], velocity[name]) == still

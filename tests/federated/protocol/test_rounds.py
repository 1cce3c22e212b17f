"""What happens from round to round: what restarts, what lives on, what nobody may count twice."""

import dataclasses

import numpy as np
import pytest
import torch
from synthetic import HET, clients, expected_shared, get, layers, run, weights

from braidlora.errors import FederationError
from braidlora.federated import ClientUpdate, get_rule
from braidlora.federated.protocol.rules.rule import Rule

SHAPES = [(14, 12), (9, 16)]


def het_update(client, layer, base):
    A, M, B1, B2 = (get(client.state, layer, f"factoredlora_{f}") for f in ("A", "M", "B1", "B2"))
    return client.scaling * (base + B2 @ B1) @ M @ A


@pytest.mark.parametrize("wire", ["factors", "smallest"])
def test_heterogeneous_base_accumulates_and_no_update_counts_twice(wire):
    rule = get_rule(HET, wire=wire)
    made = clients(HET, [2, 7, 4], SHAPES, rows=[10, 30, 60])
    p = weights(made)
    shared, total = {}, dict.fromkeys(layers(made[0].state), 0.0)
    for round_number in (1, 2):
        for layer in total:
            total[layer] = total[layer] + sum(
                pi * get(c.state, layer, "factoredlora_B2") @ get(c.state, layer, "factoredlora_B1")
                for pi, c in zip(p, made, strict=True)
            )
        shared = run(rule, made, shared)
        for layer, base in total.items():
            np.testing.assert_allclose(get(shared, layer, "factoredlora_base"), base, atol=1e-10, rtol=0)
        for client in made:
            before = dict(client.state)
            client.state = rule.restart(client.state, torch.Generator().manual_seed(round_number))
            for layer, base in total.items():
                # Nothing of the client's own B2 B1 is left: its update is that of the base alone.
                A, M = (get(before, layer, f"factoredlora_{f}") for f in "AM")
                expected = client.scaling * base @ M @ A
                np.testing.assert_allclose(het_update(client, layer, base), expected, atol=1e-12, rtol=0)
                assert not torch.equal(
                    client.state[f"{layer}.factoredlora_B1.weight"], before[f"{layer}.factoredlora_B1.weight"]
                )
        # An untrained round adds nothing, whoever takes part.
        idle = run(rule, made, shared)
        assert all(torch.equal(idle[name], shared[name]) for name in shared)
        for client in made:  # "training"
            for name in client.state:
                if "B1" in name or "B2" in name:
                    client.state[name] = client.state[name] + torch.randn_like(client.state[name])


def test_forgetting_to_restart_would_count_twice():
    """Shows that the test above can fail: without the restart the base moves again."""
    rule, made = get_rule(HET), clients(HET, [3], SHAPES)
    once = run(rule, made)
    twice = run(rule, made, once)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_heterogeneous_effective_update_is_continuous_over_a_round_for_one_client():
    rule, made = get_rule(HET), clients(HET, [3], SHAPES)
    client = made[0]
    shared = {}
    for _ in range(3):
        bases = {
            layer: get(shared, layer, "factoredlora_base") if shared else 0.0
            for layer in layers(client.state)
        }
        before = {layer: het_update(client, layer, base) for layer, base in bases.items()}
        shared = run(rule, made, shared)
        client.state = rule.restart(client.state)
        for layer, value in before.items():
            after = het_update(client, layer, get(shared, layer, "factoredlora_base"))
            np.testing.assert_allclose(after, value, atol=1e-10, rtol=0)
        client.state = {n: t + torch.randn_like(t) if "B" in n else t for n, t in client.state.items()}


def test_smallest_wire_form_is_the_same_aggregate():
    made = clients(HET, [2, 7, 4], SHAPES, m=5)
    small = get_rule(HET, wire="smallest")
    forms = [{name.split(".")[-2] for name in small.outgoing(client.state)} for client in made]
    # d, m = 14, 5: 7 · 19 > 70 and 4 · 19 > 70, 2 · 19 < 70; d, m = 9, 5: 4 · 14 > 45, 2 · 14 < 45.
    assert forms == [
        {"factoredlora_B1", "factoredlora_B2"},
        {"factoredlora_product"},
        {"factoredlora_product"},
    ]
    ours, theirs = run(small, made), run(get_rule(HET), made)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-12, rtol=0)


def test_products_are_refused_where_factors_travel():
    small, made = get_rule(HET, wire="smallest"), clients(HET, [7], SHAPES)
    rule = get_rule(HET)
    rule.start({})
    with pytest.raises(FederationError, match=r"factoredlora_product.*may not be sent"):
        rule.add(ClientUpdate("a", 1, small.outgoing(made[0].state)))


def test_flora_carries_every_round_and_restarts():
    rule, history = get_rule("flora"), {}
    shared = {}
    for seed in range(4):
        made = clients("flora", [2, 3], SHAPES, seed=seed, scaling=[2.0, 0.5])
        shared = run(rule, made, shared)
        for layer, W in expected_shared("flora", made).items():
            history[layer] = history.get(layer, 0.0) + W
            payload = rule.payload_for(shared, 2)
            last = get(payload, layer, "lora_B") @ get(payload, layer, "lora_A")
            np.testing.assert_allclose(last, W, atol=1e-10, rtol=0)
            assert set(rule.payload_for(shared, 2)) == {
                f"{one}.lora_{f}.weight" for one in layers(shared) for f in "AB"
            }
            everything = rule.catch_up(shared, 2)
            A, B = get(everything, layer, "lora_A"), get(everything, layer, "lora_B")
            np.testing.assert_allclose(B @ A, history[layer], atol=1e-9, rtol=0)
            carried = shared.get(f"{layer}.carried_A.weight")
            assert carried is None or carried.shape[0] <= min(B.shape[0], A.shape[1])
    fresh = rule.restart(made[0].state)
    assert all(torch.count_nonzero(tensor) == 0 for name, tensor in fresh.items() if "lora_B" in name)


def test_flora_carries_no_zeros_from_an_adapter_as_it_starts():
    rule, made = get_rule("flora"), clients("flora", [2, 3], SHAPES)
    start = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in made[1].state.items()}
    shared = run(rule, made, start)
    assert {n.split(".")[-2] for n in shared} == {"lora_A", "lora_B"}
    assert {t.shape[0] for n, t in rule.catch_up(shared, 2).items() if "lora_A" in n} == {5}


def test_flora_beyond_the_full_rank_is_dense_and_exact():
    scaling, rows = [1.0, 2.0, 3.0, 4.0, 5.0], [10**6] * 5
    rule, made = get_rule("flora"), clients("flora", [6] * 5, SHAPES, scaling=scaling, rows=rows)
    shared = run(rule, made)
    for layer, W in expected_shared("flora", made).items():
        A, B = get(shared, layer, "lora_A"), get(shared, layer, "lora_B")
        assert A.shape[0] == B.shape[1] == min(W.shape)
        np.testing.assert_allclose(B @ A, W, atol=1e-10, rtol=0)
        # Neither factor carries the number of rows, which 16 bits could not hold.
        A, B = (shared[f"{layer}.lora_{f}.weight"].half().double().numpy() for f in "AB")
        np.testing.assert_allclose(B @ A, W, atol=0.05, rtol=0)


def test_flexlora_divides_by_the_clients_own_scaling():
    made = clients("flexlora", [2, 4, 4], SHAPES, scaling=[3.0, 0.5, 0.5])
    rule = get_rule("flexlora")
    shared = run(rule, made)
    seen, told = rule.payload_for(shared, 2), rule.payload_for(shared, 2, scaling=3.0)
    assert all(torch.equal(seen[name], told[name]) for name in seen), "known from the update of that rank"
    resumed = get_rule("flexlora").payload_for(shared, 2, scaling=3.0)
    assert all(torch.equal(seen[name], resumed[name]) for name in seen), "a restarted server is told"
    with pytest.raises(FederationError, match=r"scalings 0\.5, 3.*payload_for\(shared, 3, scaling="):
        rule.payload_for(shared, 3)


def test_flexlora_gives_a_larger_rank_directions_to_train_in():
    """Zero rows in A together with zero columns in B would never get a gradient."""
    rule, made = get_rule("flexlora"), clients("flexlora", [2], SHAPES)
    payload = rule.payload_for(run(rule, made), 6, 2.0)
    for layer in layers(made[0].state):
        A, B = get(payload, layer, "lora_A"), get(payload, layer, "lora_B")
        np.testing.assert_allclose(A @ A.T, np.eye(6), atol=1e-12)
        assert (B[:, 2:] == 0).all()


def test_zero_padding_cuts_and_pads():
    rule = get_rule("zero-padding")
    made = clients("zero-padding", [2, 4], SHAPES)
    payload = rule.payload_for(run(rule, made), 2)
    assert {tensor.shape[0] for name, tensor in payload.items() if "lora_A" in name} == {4}, (
        "the largest rank is sent"
    )
    for rank in (1, 2, 4, 6):
        mine = rule.received(payload, rank)
        for name, tensor in mine.items():
            axis, kept = (0 if "lora_A" in name else 1), min(rank, 4)
            assert tensor.shape[axis] == rank
            assert torch.equal(tensor.narrow(axis, 0, kept), payload[name].narrow(axis, 0, kept))


def test_restart_is_seeded_and_touches_only_what_restarts():
    rule = Rule(dataclasses.replace(get_rule("fedit").spec, restarts=("lora_A",)))
    state = clients("fedit", [3], SHAPES)[0].state
    one = rule.restart(state, torch.Generator().manual_seed(3))
    two = rule.restart(dict(reversed(state.items())), torch.Generator().manual_seed(3))
    for name, tensor in state.items():
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], tensor) == ("lora_B" in name)
        if "lora_A" in name:
            assert one[name].abs().max() <= tensor.shape[1] ** -0.5

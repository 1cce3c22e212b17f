"""One battery for every rule: the formula, any order, one client, equal clients, partial participation."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from synthetic import (
    AGGREGATING,
    ANY,
    EQUAL,
    HET,
    PRODUCTS,
    best_of_rank,
    clients,
    effective,
    expected_shared,
    get,
    layers,
    own_update,
    run,
)  # fmt: skip

from braidlora.federated import RULE_NAMES, get_rule
from braidlora.federated.protocol.robust import NormClip

SHAPES = [(14, 12), (9, 16)]
RANKS = {name: [3, 3, 3, 3] if name in EQUAL else [2, 5, 1, 3] for name in AGGREGATING}
OWN_SCALING = PRODUCTS


def group(name, ranks=None, **settings):
    ranks = ranks or RANKS[name]
    scaling = [0.5 + i for i in range(len(ranks))] if name in OWN_SCALING else 2.0
    return clients(name, ranks, SHAPES, **{"scaling": scaling, **settings})


def assert_formula(name, rule, shared, made, before=None, atol=1e-10):
    expected = expected_shared(name, made, before)
    if name == "flora":
        for layer, W in expected.items():
            B, A = (shared[f"{layer}.lora_{f}.weight"].double().numpy() for f in "BA")
            np.testing.assert_allclose(B @ A, W, atol=atol, rtol=0)
    elif name in PRODUCTS:
        for client in made:
            payload = rule.payload_for(shared, client.rank, client.scaling)
            for layer, W in expected.items():
                B, A = (payload[f"{layer}.lora_{f}.weight"].double().numpy() for f in "BA")
                assert A.shape[0] == B.shape[1] == client.rank
                got = client.scaling * B @ A
                np.testing.assert_allclose(got, best_of_rank(W, client.rank), atol=atol, rtol=0)
    else:
        assert shared.keys() == expected.keys()
        for tensor_name, value in expected.items():
            np.testing.assert_allclose(shared[tensor_name].double().numpy(), value, atol=atol, rtol=0)


def test_names():
    assert {"local", *AGGREGATING} == set(RULE_NAMES)
    assert all(get_rule(name).spec.name == name for name in RULE_NAMES)


@pytest.mark.parametrize("name", AGGREGATING)
def test_formula(name):
    rule, made = get_rule(name), group(name)
    assert_formula(name, rule, run(rule, made), made)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", AGGREGATING)
def test_formula_for_any_ranks_and_shapes(name, data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=2))
    count = data.draw(st.integers(1, 5))
    if name in EQUAL:
        ranks = [data.draw(st.integers(1, 8))] * count
    else:
        ranks = data.draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    rows = data.draw(st.lists(st.integers(1, 10**12), min_size=count, max_size=count))
    scaling = [0.25 + i for i in range(count)] if name in OWN_SCALING else 0.7
    made = clients(name, ranks, shapes, seed=data.draw(st.integers(0, 99)), rows=rows, scaling=scaling)
    rule = get_rule(name)
    assert_formula(name, rule, run(rule, made), made, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", AGGREGATING)
def test_sums_are_float32_whatever_travels(name, dtype):
    rule = get_rule(name)
    made = group(name, [3] * 40 if name in EQUAL else [1, 2, 3, 4] * 10, rows=[1] * 40)
    shared = run(rule, made, dtype=dtype)
    assert {tensor.dtype for tensor in shared.values()} == {torch.float32}
    for client in made:  # what was rounded for the wire is the input of the formula
        client.state = {n: t.to(dtype).double() for n, t in client.state.items()}
    assert_formula(name, rule, shared, made, atol=2e-4)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
@pytest.mark.parametrize("name", AGGREGATING)
def test_clients_may_send_different_float_types(name, order):
    rule, made = get_rule(name), group(name)
    types = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    rule.start({}, 1)
    for i in order:
        update = made[i].update(rule, types[i])
        if name == HET and i == 1:  # within one update too
            tensors = {n: t.float() if "B1" in n else t for n, t in update.tensors.items()}
            update = dataclasses.replace(update, tensors=tensors)
        rule.add(update)
    shared = rule.finish()
    assert {tensor.dtype for tensor in shared.values()} == {torch.float64}
    for client, dtype in zip(made, types, strict=True):
        client.state = {n: t.to(dtype).double() for n, t in client.state.items()}
    assert_formula(name, rule, shared, made, atol=2e-5)


@pytest.mark.parametrize("name", AGGREGATING)
def test_what_is_kept_and_sent_is_fit_for_a_file_and_has_no_history(name):
    """In one process clients may hand over views and parameters."""
    rule, made = get_rule(name), group(name, [4])
    made[0].state = {n: torch.nn.Parameter(t.mT.contiguous().mT) for n, t in made[0].state.items()}
    shared = run(rule, made)
    again = run(rule, made, {n: torch.nn.Parameter(t) for n, t in shared.items()})
    for tensors in (shared, again, rule.payload_for(again, 4, 2.0), rule.catch_up(again, 3, 2.0)):
        assert not any(tensor.requires_grad for tensor in tensors.values())
        assert load(save(tensors)).keys() == tensors.keys(), "safetensors refuses views"


@pytest.mark.parametrize("name", AGGREGATING)
def test_order_changes_rounding_only(name):
    rule, made = get_rule(name), group(name)
    shared = run(rule, made)
    other = run(rule, made, order=[2, 0, 3, 1])
    again = run(rule, made)
    assert all(torch.equal(shared[key], again[key]) for key in shared), "the same order gives the same bytes"
    for client in made:
        for layer in layers(client.state):
            np.testing.assert_allclose(
                effective(rule, other, client, layer),
                effective(rule, shared, client, layer),
                atol=1e-9,
                rtol=0,
            )


@pytest.mark.parametrize("name", AGGREGATING)
def test_one_client_keeps_its_update(name):
    rule, made = get_rule(name), group(name, [4])
    shared = run(rule, made)
    for layer in layers(made[0].state):
        np.testing.assert_allclose(
            effective(rule, shared, made[0], layer), own_update(name, made[0], layer), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("name", AGGREGATING)
def test_equal_clients_are_a_fixed_point(name):
    rule = get_rule(name)
    made = group(name, [4])
    twins = [
        type(made[0])(f"twin{i}", rows, 4, made[0].scaling, made[0].state)
        for i, rows in enumerate([3, 50, 7])
    ]
    shared = run(rule, twins)
    for layer in layers(made[0].state):
        np.testing.assert_allclose(
            effective(rule, shared, twins[1], layer), own_update(name, made[0], layer), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("name", ["fedsa-lora", "fed-alora"])
def test_the_mean_of_the_clients_updates_is_fedits(name):
    """The docs say so of rules under which a factor stays with its client."""
    made = group(name)
    total = sum(client.rows for client in made)
    fedit, rule = get_rule("fedit"), get_rule(name)
    whole, shared = run(fedit, made), run(rule, made)
    for layer in layers(made[0].state):
        mean = sum(client.rows / total * effective(rule, shared, client, layer) for client in made)
        np.testing.assert_allclose(mean, effective(fedit, whole, made[0], layer), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", EQUAL)
def test_means_of_equal_float32_clients_are_exact_to_the_bit(name):
    rule, made = get_rule(name), group(name, [4])
    twins = [type(made[0])(f"twin{i}", rows, 4, 2.0, made[0].state) for i, rows in enumerate([3, 50, 7])]
    shared = run(rule, twins, dtype=torch.float32)
    assert all(
        torch.equal(tensor, made[0].state[key.replace("rest", "lora")].float())
        for key, tensor in shared.items()
    )


@pytest.mark.parametrize("name", AGGREGATING)
def test_weights_are_over_those_who_took_part(name):
    """The same as if the absent had never been in the federation; what they sent earlier leaves no trace."""
    rule, made = get_rule(name), group(name)
    run(rule, made)
    some = [made[0], made[2]]
    assert_formula(name, rule, run(rule, some), some)


@pytest.mark.parametrize("name", ANY)
def test_shared_state_keeps_its_rank_without_the_largest_client(name):
    """Client 1 has the largest rank and is absent in the second round."""
    rule, made = (
        get_rule(name, **({"max_rank": 5} if "max_rank" in get_rule(name).spec.settings else {})),
        group(name),
    )
    first = run(rule, made)
    second = run(rule, [made[0], made[2]], first)
    payload = rule.received(rule.payload_for(second, 5, made[1].scaling), 5)
    key = f"{layers(made[0].state)[0]}.lora_A.weight"
    if name in ("zero-padding", "flexlora", "raflora"):
        assert first[key].shape[0] == second[key].shape[0] == payload[key].shape[0] == 5
    layer = layers(made[0].state)[0]
    assert np.isfinite(effective(rule, second, made[1], layer)).all()


@pytest.mark.parametrize("max_rank", [None, 6])
def test_flexlora_keeps_what_a_client_of_a_higher_rank_can_use(max_rank):
    """Whoever took part: three clients of rank 2 make a W of rank 6, and one of rank 6 is sent all of it."""
    rule, made = get_rule("flexlora", max_rank=max_rank), group("flexlora", [2, 2, 2])
    shared = run(rule, made)
    for layer, W in expected_shared("flexlora", made).items():
        payload = rule.payload_for(shared, 6, 3.0)
        got = 3.0 * get(payload, layer, "lora_B") @ get(payload, layer, "lora_A")
        np.testing.assert_allclose(got, W, atol=1e-10, rtol=0)
        if max_rank:
            assert shared[f"{layer}.lora_A.weight"].shape[0] == 6


@pytest.mark.parametrize("name", RULE_NAMES)
def test_nothing_but_what_the_rule_shares_is_sent_or_kept(name):
    """Whatever lies in a client's or a server's state dict."""
    rule = get_rule(name)
    made = clients(HET, [2, 2], SHAPES) if name == HET else clients(name, [2, 2], SHAPES)
    further = {
        "base_model.model.layers.0.q_proj.base_layer.weight": torch.zeros(14, 12),
        "score.weight": torch.zeros(2),
    }
    further["base_model.model.layers.0.q_proj.braidlora_router.weight"] = torch.zeros(3, 12)
    full = {**made[0].state, **further}
    factors = {key.split(".")[-2] for key in rule.outgoing(full)}
    assert factors == set(rule.spec.uploads)
    full |= {f"{layer}.factoredlora_base.weight": torch.zeros(9, 5) for layer in layers(made[0].state)}
    assert {key.split(".")[-2] for key in rule.payload_for(full, 2)} <= set(rule.spec.downloads)
    if name == "local":
        rule.start(full)
        assert rule.finish() == {}
    else:
        rule.start(full if name != HET else {}, 1)
        rule.add(made[0].update(rule))
        assert {key.split(".")[-2] for key in rule.finish()} <= set(rule.spec.keeps)


@pytest.mark.parametrize("name", AGGREGATING)
def test_aggregates_share_no_memory_with_updates_or_payloads(name):
    """Clients swap adapters in place; what they do to their tensors must not reach the server, nor the reverse."""
    rule, made = get_rule(name), group(name, [4])
    expected = run(rule, made)
    rule.start({}, 1)
    update = made[0].update(rule)
    rule.add(update)
    for tensor in update.tensors.values():
        tensor.fill_(777.0)
    shared = rule.finish()
    assert all(torch.equal(shared[key], expected[key]) for key in shared)
    for tensor in rule.payload_for(shared, 4, 2.0).values():
        tensor.fill_(777.0)
    assert all(torch.equal(shared[key], expected[key]) for key in shared)


@pytest.mark.parametrize("name", AGGREGATING)
def test_a_head_travels_only_where_the_recipe_shares_it(name):
    head = "base_model.model.score.weight"
    made = group(name)
    for i, client in enumerate(made):
        client.state[head] = torch.full((2, 3), float(i), dtype=torch.float64)
    assert head not in get_rule(name).outgoing(made[0].state)
    rule = get_rule(name, also_share=[head])
    shared = run(rule, made)
    mean = sum(client.rows * i for i, client in enumerate(made)) / sum(client.rows for client in made)
    torch.testing.assert_close(shared[head], torch.full((2, 3), mean, dtype=torch.float64))
    assert head in rule.payload_for(shared, 2, 1.0)
    second = run(rule, made, shared)
    torch.testing.assert_close(second[head], shared[head])


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        (name, clip)
        for name in [*EQUAL, HET]
        for clip in (False, True)
        if not clip or get_rule(name).spec.robust
    ]
    + [("zero-padding", False)],
)
def test_memory_does_not_grow_with_clients(name, clip):
    """Counted rather than timed: floating-point storage that the rule holds after 2 and after 20 clients."""
    rule = get_rule(name, aggregator=NormClip(1.0)) if clip else get_rule(name)
    made = group(name, [3] * 20)
    rule.start(rule.outgoing(made[0].state, 1) if clip else {}, 1)
    held = []
    for i, client in enumerate(made):
        rule.add(client.update(rule, torch.float32))
        if i in (1, 19):
            held.append(_bytes_held(rule, set()))
    assert held[0] == held[1] > 0


def _bytes_held(thing, seen):
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(_bytes_held(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return sum(_bytes_held(value, seen) for value in thing)
    return _bytes_held(vars(thing), seen) if hasattr(thing, "__dict__") else 0

"""Several rounds with other clients in each, against dense matrices kept beside; who may hold whose memory."""

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seven_clients import Round, recipe
from synthetic import AGGREGATING, ANY, HET, best_of_rank, clients, expected_shared, get, layers, run, weights

from braidlora.federated import get_rule
from braidlora.federated.protocol.robust import CoordinateMedian, Krum, NormClip, TrimmedMean

SHAPES = [(14, 12), (9, 16)]

federations = st.fixed_dictionaries(
    {
        "ranks": st.lists(st.integers(1, 9), min_size=2, max_size=4),
        "shapes": st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=2),
        "seed": st.integers(0, 99),
    }
)
rounds = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=3, max_size=5)


def taking_part(made, who):
    """The clients of these numbers; the first where none has one."""
    return [client for i, client in enumerate(made) if i in who] or made[:1]


def train(made, generator):
    """Stands for local training: every trained factor moves."""
    for client in made:
        client.state = {
            n: t + torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in client.state.items()
        }


@settings(max_examples=25, deadline=None)
@given(
    federation=federations, rounds=rounds, m=st.integers(1, 6), wire=st.sampled_from(["factors", "smallest"])
)
def test_heterogeneous_base_is_the_sum_of_what_each_round_taught(federation, rounds, m, wire):
    rule, made = get_rule(HET, wire=wire), clients(HET, **federation, m=m)
    generator = torch.Generator().manual_seed(federation["seed"])
    bases, shared = dict.fromkeys(layers(made[0].state), 0.0), {}
    for who in rounds:
        some = taking_part(made, who)
        train(some, generator)
        for layer in bases:
            for p, client in zip(weights(some), some, strict=True):
                B2, B1 = (get(client.state, layer, f"factoredlora_{f}") for f in ("B2", "B1"))
                bases[layer] = bases[layer] + p * B2 @ B1
        shared = run(rule, some, shared)
        for client in some:
            client.state = rule.restart(client.state, generator)
        for layer, base in bases.items():
            np.testing.assert_allclose(get(shared, layer, "factoredlora_base"), base, atol=1e-9, rtol=0)
            for client in some:  # what it taught is in the base now, and nowhere else
                assert not get(client.state, layer, "factoredlora_B2").any()


@settings(max_examples=25, deadline=None)
@given(federation=federations, rounds=rounds)
def test_flora_gives_everybody_the_whole_history_once(federation, rounds):
    """A client that took part in the last round is sent that round's stack, another all rounds at once."""
    scaling = [0.5 + i for i in range(len(federation["ranks"]))]
    rule, made = get_rule("flora"), clients("flora", **federation, scaling=scaling)
    generator = torch.Generator().manual_seed(federation["seed"])
    history, shared = dict.fromkeys(layers(made[0].state), 0.0), {}
    carried = {client.name: dict.fromkeys(history, 0.0) for client in made}
    seen = dict.fromkeys(carried, 0)  # rounds inside what a client carries
    for done, who in enumerate(rounds):
        some = taking_part(made, who)
        for client in some:
            missed = seen[client.name] < done - 1
            sent = (rule.catch_up if missed else rule.payload_for)(shared, client.rank, client.scaling)
            for layer in history if done else ():
                product = get(sent, layer, "lora_B") @ get(sent, layer, "lora_A")
                before = 0.0 if missed else carried[client.name][layer]
                carried[client.name][layer] = before + product
                np.testing.assert_allclose(carried[client.name][layer], history[layer], atol=1e-8, rtol=0)
            seen[client.name] = done
        train(some, generator)
        for layer, W in expected_shared("flora", some).items():
            history[layer] = history[layer] + W
        shared = run(rule, some, shared)
    for layer, W in history.items():  # what a client that never took part is sent
        whole = rule.catch_up(shared, 1)
        assert get(whole, layer, "lora_A").shape[0] <= min(W.shape)
        np.testing.assert_allclose(
            get(whole, layer, "lora_B") @ get(whole, layer, "lora_A"), W, atol=1e-8, rtol=0
        )


@settings(max_examples=25, deadline=None)
@given(federation=federations, rounds=rounds)
def test_zero_padding_over_changing_clients(federation, rounds):
    rule, made = get_rule("zero-padding"), clients("zero-padding", **federation)
    generator, shared, largest = torch.Generator().manual_seed(federation["seed"]), {}, 0
    for who in rounds:
        some = taking_part(made, who)
        train(some, generator)
        shared = run(rule, some, shared)
        largest = max(largest, *(client.rank for client in some))
        for name, mean in expected_shared("zero-padding", some).items():
            axis = 0 if "lora_A" in name else 1
            wanted = np.zeros([largest if i == axis else size for i, size in enumerate(mean.shape)])
            wanted[: mean.shape[0], : mean.shape[1]] = mean
            np.testing.assert_allclose(shared[name].numpy(), wanted, atol=1e-9, rtol=0)


@settings(max_examples=12, deadline=None)
@given(federation=federations, rounds=rounds)
def test_flexlora_over_changing_clients(federation, rounds):
    """Also the client that was away is sent the best matrix of its rank, whoever took part, under its own scaling."""
    scaling = [0.5 + i for i in range(len(federation["ranks"]))]
    rule, made = get_rule("flexlora"), clients("flexlora", **federation, scaling=scaling)
    generator, shared = torch.Generator().manual_seed(federation["seed"]), {}
    for who in rounds:
        some = taking_part(made, who)
        train(some, generator)
        shared = run(rule, some, shared)
        for client in made:
            payload = rule.payload_for(shared, client.rank, client.scaling)
            for layer, W in expected_shared("flexlora", some).items():
                B, A = get(payload, layer, "lora_B"), get(payload, layer, "lora_A")
                assert (B.shape[1], A.shape[0]) == (client.rank, client.rank)
                wanted = best_of_rank(W, client.rank)
                np.testing.assert_allclose(client.scaling * B @ A, wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", AGGREGATING)
def test_nothing_given_is_changed_and_nothing_returned_is_kept(name):
    ranks = [2, 5, 1, 3] if name in ANY else [3] * 4
    rule, made = get_rule(name), clients(name, ranks, SHAPES)
    first = run(rule, made)
    given = {n: t.clone() for n, t in first.items()}
    sent = [{n: t.clone() for n, t in client.state.items()} for client in made]
    second = run(rule, made, first)
    assert all(torch.equal(first[n], given[n]) for n in given)
    for client, before in zip(made, sent, strict=True):
        assert all(torch.equal(client.state[n], before[n]) for n in before)

    expected = {n: t.clone() for n, t in second.items()}
    for tensors in (first, *(client.state for client in made)):
        for tensor in tensors.values():
            tensor.fill_(777.0)
    assert all(torch.equal(second[n], expected[n]) for n in expected)
    for tensor in second.values():
        tensor.fill_(777.0)
    for client, before in zip(made, sent, strict=True):
        client.state = before
    again, fresh = run(rule, made, given), run(get_rule(name), made, given)
    assert all(torch.equal(again[n], fresh[n]) for n in fresh), "a round leaves nothing behind in the rule"
    assert all(torch.equal(again[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    "aggregator", [NormClip(0.5), CoordinateMedian(), TrimmedMean(0.25), Krum(0, 4), Krum(0, 4, keep=3)]
)
def test_robust_aggregates_share_no_memory_either(aggregator):
    rule, made = get_rule("fed-alora", aggregator=aggregator), clients("fed-alora", [3] * 4, SHAPES)
    expected = run(rule, made)
    rule.start({})
    for client in made:
        update = client.update(rule)
        rule.add(update)
        for tensor in update.tensors.values():
            tensor.fill_(777.0)
    shared = rule.finish()
    assert all(torch.equal(shared[n], expected[n]) for n in expected)
    made = clients("fed-alora", [3] * 4, SHAPES)
    run(rule, made)
    assert all(torch.equal(shared[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("aggregator", "liars"),
    [(TrimmedMean(0.3), 2), (CoordinateMedian(), 3), (Krum(2, 10), 2), (Krum(2, 10, 3), 2)],
)
def test_robust_aggregates_when_three_of_ten_stay_away(aggregator, liars):
    """The bound holds for as many liars as the seven who came allow."""
    rule, made = get_rule("fed-alora", aggregator=aggregator), clients("fed-alora", [3] * 7, SHAPES)
    generator = torch.Generator().manual_seed(0)
    for i, client in enumerate(made):
        client.state = {
            n: (-1e4 if i < liars else 1.0) * (1.0 + 0.1 * torch.rand(t.shape, generator=generator).double())
            for n, t in client.state.items()
        }
    for tensor in run(rule, made).values():
        assert 1.0 <= tensor.min() <= tensor.max() <= 1.1


@settings(max_examples=25, deadline=None)
@given(federation=federations, rounds=rounds)
def test_zero_padding_by_rank_forgets_no_rank(federation, rounds):
    """Every rank is the mean over the clients that have it; where none took part it stays, to the bit."""
    rule, made = get_rule("zero-padding", padding="by-rank"), clients("zero-padding", **federation)
    generator, shared = torch.Generator().manual_seed(federation["seed"]), {}
    for who in rounds:
        some = taking_part(made, who)
        train(some, generator)
        before, shared = shared, run(rule, some, shared)
        for name, tensor in shared.items():
            tensor = tensor if "lora_A" in name else tensor.mT
            for rank, got in enumerate(tensor):
                having = [client for client in some if client.rank > rank]
                if not having:
                    old = before[name] if "lora_A" in name else before[name].mT
                    assert torch.equal(got, old[rank])
                    continue
                own = [client.state[name] if "lora_A" in name else client.state[name].mT for client in having]
                wanted = sum(p * one[rank].numpy() for p, one in zip(weights(having), own, strict=True))
                np.testing.assert_allclose(got.numpy(), wanted, atol=1e-10, rtol=0)
        top = max(made, key=lambda client: client.rank)
        sent = rule.received(rule.payload_for(shared, top.rank), top.rank, top.state)
        assert all(tensor.shape == top.state[name].shape for name, tensor in sent.items())


def test_a_rank_that_nobody_has_taken_part_with_starts_as_its_client_did():
    """Not at zero in both factors, from where no gradient leads away."""
    rule, made = get_rule("zero-padding", padding="by-rank"), clients("zero-padding", [2, 5], SHAPES)
    shared = run(rule, made[:1])
    sent = rule.received(rule.payload_for(shared, 5), 5, made[1].state)
    for name, tensor in sent.items():
        low, high = (slice(0, 2), slice(2, 5)) if "lora_A" in name else (np.s_[:, :2], np.s_[:, 2:])
        assert torch.equal(tensor[low], shared[name])
        assert torch.equal(tensor[high], made[1].state[name][high])
    published = get_rule("zero-padding")
    sent = published.received(published.payload_for(shared, 5), 5, made[1].state)
    assert all(not (t[2:] if "lora_A" in n else t[:, 2:]).any() for n, t in sent.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"rule": "zero-padding"},
            r"draws 2 of 7 clients, and in 48 % of the rounds none of rank 4.*padding=by-rank",
        ),
        (
            {"rule": "flexlora"},
            r"in 48 % of the rounds none of rank 4: flexlora then replaces the shared update",
        ),
        ({"rule": "zero-padding", "padding": "by-rank"}, ""),
        ({"rule": "flora"}, ""),
        ({"rule": HET}, ""),
        ({"rule": "zero-padding", "sample": {"number": 6}}, ""),  # two have rank 4, so one of them is asked
        ({"rule": "zero-padding", "sample": None}, ""),
        ({"rule": "zero-padding", "ranks": None}, ""),
    ],
)
def test_sampling_that_loses_the_higher_ranks_is_warned_of_at_the_start(options, said):
    options = {"ranks": [2, 4, 1, 3, 4, 2, 1], "sample": {"number": 2}, **options}
    config = recipe(
        options.pop("rule"), **{key: value for key, value in options.items() if value is not None}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Round(config)
    texts = [str(one.message) for one in caught if "federation.sample" in str(one.message)]
    assert len(texts) == bool(said)
    for text in texts:
        assert re.search(said, text), text

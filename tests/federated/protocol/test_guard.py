"""The guard: who may reply, with what, how often; one client's share; quorum."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import HET, clients, take

from braidlora.errors import ConfigError
from braidlora.federated import RULE_NAMES, AdaptedLayer, get_rule
from braidlora.federated.protocol.guard import Guard, UpdateRejected, capped_weights, quorum

SHAPES = [(14, 12), (9, 16)]
LAYERS = [AdaptedLayer(f"base_model.model.layers.{j}.q_proj", d, k) for j, (d, k) in enumerate(SHAPES)]
B0 = "base_model.model.layers.0.q_proj.lora_B.weight"


def setting(name="fed-alora", ranks=(3, 3, 3), **settings):
    rule, made = get_rule(name, r_intermediate=5), clients(name, list(ranks), SHAPES)
    guard = Guard(rule, LAYERS, {c.name: c.rank for c in made}, **settings)
    guard.open(4, [client.name for client in made])
    return guard, rule, [client.update(rule, torch.float32, round=4) for client in made]


def with_tensor(update, name, tensor):
    return dataclasses.replace(update, tensors={**update.tensors, name: tensor})


@pytest.mark.parametrize("name", RULE_NAMES)
def test_honest_updates_count(name):
    guard, _, updates = setting(name, (3, 3, 3) if get_rule(name).spec.ranks == "equal" else (2, 5, 3))
    for update in reversed(updates):
        take(guard, update)
    assert sorted(guard.accepted) == ["client000", "client001", "client002"]
    assert guard.missing == []


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            torch.full((14, 3), math.nan),
            r"q_proj\.lora_B\.weight holds 42 values that are NaN or infinite, of 42",
        ),
        (torch.full((14, 3), -math.inf), "NaN or infinite"),
        (torch.zeros(14, 1), r"has shape \(14, 1\); expected \(14, 3\): rank 1 for 3"),
        (torch.zeros(1, 3), r"has shape \(1, 3\); expected \(14, 3\)"),
        (torch.zeros(3, 14), r"has shape \(3, 14\); expected \(14, 3\)"),
        (torch.zeros(3), r"has shape \(3,\); expected a matrix"),
        (torch.zeros(14, 3, dtype=torch.int64), "dtype int64; expected float32"),
        ([[0.0] * 3] * 14, "is a list; expected a dense tensor"),
    ],
)
def test_bad_tensors_cost_their_sender_only(tensor, said):
    guard, rule, updates = setting()
    with pytest.raises(UpdateRejected, match=rf"client 'client001', round 4, rejected: .*{said}") as error:
        take(guard, with_tensor(updates[1], B0, tensor))
    assert (error.value.client, error.value.round, error.value.exit_code) == ("client001", 4, 6)
    take(guard, updates[0])
    take(guard, updates[2])
    assert guard.missing == ["client001"]
    rule.start({})
    for update in updates:
        if update.client in guard.accepted:
            rule.add(update)
    expected = (
        updates[0].num_examples * updates[0].tensors[B0] + updates[2].num_examples * updates[2].tensors[B0]
    ) / (updates[0].num_examples + updates[2].num_examples)
    torch.testing.assert_close(rule.finish()[B0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_wire_type(dtype):
    guard, _, updates = setting(dtype=torch.float32)
    tensors = {name: tensor.to(dtype) for name, tensor in updates[0].tensors.items()}
    with pytest.raises(UpdateRejected, match=f"dtype {str(dtype)[6:]}; expected float32"):
        take(guard, dataclasses.replace(updates[0], tensors=tensors))
    take(guard, updates[0])


@pytest.mark.parametrize("rows", [0, -9, math.nan, 1.5, True, None, 10**400])
def test_numbers_of_rows(rows):
    guard, _, updates = setting()
    with pytest.raises(UpdateRejected, match=r"num_examples is .*at least 1"):
        take(guard, dataclasses.replace(updates[0], num_examples=rows))


@pytest.mark.parametrize("name", ["flora", "flexlora", HET])
def test_factors_whose_product_could_overflow(name):
    guard, rule, updates = setting(name)
    multiplied = next(n for n in sorted(updates[0].tensors) if n.split(".")[-2] in rule.spec.multiplies)
    huge = torch.full_like(updates[0].tensors[multiplied], 1e20)
    with pytest.raises(
        UpdateRejected, match=r"client000.* has values of size 1e\+20; expected at most 1e\+09"
    ):
        take(guard, with_tensor(updates[0], multiplied, huge))
    take(guard, updates[0])


def test_everything_wrong_is_said_at_once():
    guard, _, updates = setting(scalings=dict.fromkeys(["client000", "client001", "client002"], 2.0))
    bad = with_tensor(updates[0], B0, torch.full((14, 2), math.nan))
    bad = with_tensor(bad, "model.layers.0.q_proj.lora_A.weight", torch.zeros(3, 12))
    bad = dataclasses.replace(bad, num_examples=0, rank=2, scaling=4.0)
    with pytest.raises(UpdateRejected) as error:
        take(guard, bad)
    for said in (
        "num_examples is 0", "rank is 2; expected 3", "scaling is 4; expected 2", "lora_A.weight may not be sent",
        "NaN", "has shape (14, 2); expected (14, 3)",
    ):  # fmt: skip
        assert said in str(error.value)
    assert len(error.value.problems) == 6


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize(
    "foreign",
    ["lora_A", "braidlora_router", "factoredlora_A", "factoredlora_M", "factoredlora_base", "base_layer"],
)
def test_the_allow_list(name, foreign):
    guard, rule, updates = setting(name)
    tensor_name = f"base_model.model.layers.0.q_proj.{foreign}.weight"
    if foreign in rule.spec.uploads:
        take(guard, updates[0])
        return
    with pytest.raises(UpdateRejected, match=rf"{foreign}\.weight may not be sent; this rule accepts"):
        take(guard, with_tensor(updates[0], tensor_name, torch.zeros(3, 12)))


def test_missing_tensors_and_other_ranks():
    guard, _, updates = setting(HET, (2, 5, 3))
    fewer = dict(sorted(updates[1].tensors.items())[1:])
    with pytest.raises(UpdateRejected, match=r"factoredlora_B1\.weight missing; 3 tensors given, 4 expected"):
        take(guard, dataclasses.replace(updates[1], tensors=fewer))
    with pytest.raises(UpdateRejected, match=r"rank is 2; expected 5.*expected \(5, 5\): rank 2 for 5"):
        take(guard, dataclasses.replace(updates[0], client="client001"))


def test_one_reply_per_round_and_client():
    guard, _, updates = setting()
    take(guard, updates[0])
    with pytest.raises(UpdateRejected, match="already counts in this round"):
        take(guard, updates[0])
    with pytest.raises(UpdateRejected, match="the update is for round 3; round 4 is open"):
        take(guard, dataclasses.replace(updates[1], round=3))
    with pytest.raises(UpdateRejected, match="not a client of this federation"):
        take(guard, dataclasses.replace(updates[1], client="mallory"))
    guard.open(5, ["client000"])
    with pytest.raises(UpdateRejected, match="not sampled in this round"):
        take(guard, dataclasses.replace(updates[1], round=5))
    take(guard, dataclasses.replace(updates[0], round=5))
    with pytest.raises(ConfigError, match=r"unknown client mallory; .*client000"):
        guard.open(6, ["mallory"])
    assert (sorted(guard.accepted), guard.missing) == (["client000"], []), "the open round goes on"


def test_a_rejected_client_may_try_again():
    guard, _, updates = setting()
    with pytest.raises(UpdateRejected):
        take(guard, dataclasses.replace(updates[0], num_examples=0))
    take(guard, updates[0])
    assert sorted(guard.accepted) == ["client000"]


def test_federations_that_cannot_work_are_refused_at_the_start():
    with pytest.raises(
        ConfigError, match=r"'fedit' needs one rank for all clients; given: a: 2, b: 3\. zero-padding"
    ):
        Guard(get_rule("fedit"), LAYERS, {"a": 2, "b": 3})
    with pytest.raises(
        ConfigError, match=r"averages factors.*given: a: 2, b: 1\. Set alpha in proportion to the rank"
    ):
        Guard(get_rule(HET), LAYERS, {"a": 2, "b": 3}, scalings={"a": 2.0, "b": 1.0})
    Guard(get_rule("flora"), LAYERS, {"a": 2, "b": 3}, scalings={"a": 2.0, "b": 1.0})
    with pytest.raises(ConfigError, match=r"also_share: no tensor head\.weight"):
        Guard(get_rule("fedit", also_share=["head.weight"]), LAYERS, {"a": 2})


def test_shared_heads_are_checked_too():
    rule, made = get_rule("fed-alora", also_share=["head.weight"]), clients("fed-alora", [3], SHAPES)
    guard = Guard(rule, LAYERS, {"client000": 3}, shared_shapes={"head.weight": (2, 9)})
    guard.open(0, ["client000"])
    update = made[0].update(rule)
    with pytest.raises(UpdateRejected, match=r"head\.weight missing"):
        take(guard, update)
    with pytest.raises(UpdateRejected, match=r"head\.weight has shape \(9, 2\); expected \(2, 9\)"):
        take(guard, with_tensor(update, "head.weight", torch.zeros(9, 2)))
    take(guard, with_tensor(update, "head.weight", torch.zeros(2, 9)))


class TestCap:
    def test_a_giant_is_held_to_the_cap(self):
        weights = capped_weights({"giant": 10**12, "a": 100, "b": 300}, 0.5)
        assert weights == {"giant": 400.0, "a": 100.0, "b": 300.0}
        assert capped_weights({"giant": 10**12, "a": 100, "b": 100}, 1 / 3) == pytest.approx(
            {"giant": 100, "a": 100, "b": 100}
        )

    def test_nobody_above_the_cap_changes_nothing(self):
        assert capped_weights({}, 0.5) == {}
        assert capped_weights({"a": 10, "b": 12}, 0.6) == {"a": 10.0, "b": 12.0}
        assert capped_weights({"a": 7}, 1.0) == {"a": 7.0}

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 10**12), min_size=1, max_size=12), st.floats(0.0, 1.0))
    def test_shares(self, rows, position):
        cap = 1 / len(rows) + position * (1 - 1 / len(rows))
        named = {str(i): n for i, n in enumerate(rows)}
        weights = capped_weights(named, cap)
        total = sum(weights.values())
        assert all(0 < weights[name] <= n for name, n in named.items())
        assert max(weights.values()) / total <= cap * (1 + 1e-6)
        below = [name for name, n in named.items() if weights[name] < n * (1 - 1e-9)]
        assert all(weights[name] / total == pytest.approx(cap, rel=1e-6) for name in below), (
            "only giants are cut"
        )

    @pytest.mark.parametrize(("cap", "said"), [(0.3, "at least 0.5"), (0.0, "above 0"), (1.5, "at most 1")])
    def test_infeasible(self, cap, said):
        with pytest.raises(ConfigError, match=said):
            capped_weights({"a": 1, "b": 1}, cap)

    def test_takes_effect_in_a_rule(self):
        _, rule, updates = setting()
        updates[0] = dataclasses.replace(updates[0], num_examples=10**12)
        weights = capped_weights({update.client: update.num_examples for update in updates}, 0.4)
        rule.start({})
        for update in updates:
            rule.add(update, weights[update.client])
        shares = [weights[update.client] / sum(weights.values()) for update in updates]
        expected = sum(share * update.tensors[B0] for share, update in zip(shares, updates, strict=True))
        assert shares[0] == pytest.approx(0.4)
        torch.testing.assert_close(rule.finish()[B0], expected)


@pytest.mark.parametrize(
    ("accepted", "asked", "settings", "enough"),
    [
        (0, 4, {}, False), (1, 4, {}, True), (2, 4, {"min_clients": 3}, False), (3, 4, {"min_clients": 3}, True),
        (2, 4, {"fraction": 0.5}, True), (1, 4, {"fraction": 0.5}, False), (3, 10, {"fraction": 0.3}, True),
        (0, 0, {"min_clients": 0, "fraction": 0.0}, False),
    ],
)  # fmt: skip
def test_quorum(accepted, asked, settings, enough):
    assert (accepted >= quorum(asked, **settings)) == enough

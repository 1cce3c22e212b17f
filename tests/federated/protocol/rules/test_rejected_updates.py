"""What a rule does not take, and how it says so; a refused update leaves no trace."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from synthetic import AGGREGATING, EQUAL, HET, clients, run, take

from braidlora.errors import ConfigError, FederationError
from braidlora.federated import RULE_NAMES, AdaptedLayer, ClientUpdate, get_rule
from braidlora.federated.protocol.guard import Guard
from braidlora.federated.protocol.robust import CoordinateMedian, NormClip
from braidlora.federated.protocol.rules import spec_of

SHAPES = [(14, 12), (9, 16)]


def change(update, **tensors_or_fields):
    """A copy of the update; keyword names that are parts of tensor names change the first such tensor."""
    fields = {f.name for f in dataclasses.fields(ClientUpdate)}
    given = {key: value for key, value in tensors_or_fields.items() if key in fields}
    tensors = dict(update.tensors)
    for part, make in tensors_or_fields.items():
        if part not in fields:
            name = next(name for name in sorted(tensors) if part in name)
            tensors[name] = make(tensors[name])
    return dataclasses.replace(update, **{"tensors": tensors, **given})


def first_name(update):
    return sorted(update.tensors)[0].split(".")[-2]


@pytest.mark.parametrize("name", AGGREGATING)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: t.fill_(math.nan), "NaN or infinite"),
        (lambda t: t.index_fill(0, torch.tensor([0]), math.inf), "NaN or infinite"),
        (lambda t: t[:1], "shape"),
        (lambda t: t[:1, :1], "shape"),
        (lambda t: t.flatten(), "matrix"),
        (lambda t: t[None], "matrix"),
        (lambda t: t.sum(), "matrix"),
        (lambda t: t.mT, "shape"),
        (lambda t: t.int(), "dtype int32"),
        (lambda t: t.bool(), "dtype bool"),
        (lambda t: t.to(torch.complex64), "dtype complex64"),
        (lambda t: t.to_sparse(), "dense tensor"),
        (lambda t: t.tolist(), "dense tensor"),
    ],
)
@pytest.mark.parametrize("started", ["from the shared state", "from nothing"])
def test_bad_tensors(name, make, said, started):
    rule, made = get_rule(name), clients(name, [3, 3, 3], SHAPES)
    shared = run(rule, made) if started == "from the shared state" else {}
    expected = run(rule, made[:2], shared)
    update = made[2].update(rule)
    bad = change(update, **{first_name(update): lambda tensor: make(tensor.clone())})
    rule.start(shared, 1)
    rule.add(made[0].update(rule))
    with pytest.raises(FederationError, match=said) as error:
        rule.add(bad)
    assert "client002" in str(error.value)
    assert error.value.exit_code == 6
    rule.add(made[1].update(rule))
    after = rule.finish()
    assert all(torch.equal(after[key], expected[key]) for key in expected), (
        "the rest is as if it had never come"
    )


@pytest.mark.parametrize("name", AGGREGATING)
def test_a_broadcastable_shape_of_the_very_first_client(name):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES)
    shared = run(rule, made)
    update = made[0].update(rule)
    rule.start(shared, 1)
    # One column, or one row, on the axis that is not the rank.
    part = "lora_B" if name != HET else "factoredlora_B2"
    if name == "fedsa-lora":
        bad = change(update, lora_A=lambda t: t[:, :1])
    else:
        bad = change(update, **{part: lambda t: t[:1]})
    with pytest.raises(FederationError, match=r"has shape \(.*expected \("):
        rule.add(bad)


@pytest.mark.parametrize("name", AGGREGATING)
@pytest.mark.parametrize("rows", [0, -9, math.nan, 3.5, True, "7", None, 2**53 + 1, 10**400])
def test_numbers_of_rows(name, rows):
    rule, made = get_rule(name), clients(name, [3], SHAPES)
    rule.start({}, 1)
    with pytest.raises(FederationError, match=r"num_examples is .*at least 1"):
        rule.add(dataclasses.replace(made[0].update(rule), num_examples=rows))


@pytest.mark.parametrize("name", AGGREGATING)
@pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf, "2", 1e10, 10**400])
def test_scalings(name, scaling):
    rule, made = get_rule(name), clients(name, [3], SHAPES)
    rule.start({}, 1)
    with pytest.raises(FederationError, match=r"scaling is .*above 0"):
        rule.add(dataclasses.replace(made[0].update(rule), scaling=scaling))


@pytest.mark.parametrize("name", AGGREGATING)
def test_missing_and_further_tensors(name):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES)
    shared = run(rule, made)
    update = made[0].update(rule)
    rule.start(shared, 1)
    with pytest.raises(FederationError, match="missing"):
        rule.add(dataclasses.replace(update, tensors=dict(sorted(update.tensors.items())[1:])))
    with pytest.raises(FederationError, match="no tensors"):
        rule.add(dataclasses.replace(update, tensors={}))
    more = {name.replace("layers.0", "layers.7"): tensor for name, tensor in update.tensors.items()}
    with pytest.raises(FederationError, match=r"layers\.7.*not expected"):
        rule.add(dataclasses.replace(update, tensors={**update.tensors, **more}))


@pytest.mark.parametrize("started", ["from nothing", "from B alone", "from the shared state"])
@pytest.mark.parametrize("name", [name for name in AGGREGATING if len(spec_of(name).at(1).uploads) > 1])
def test_half_a_layer_is_refused_before_anything_is_summed(name, started):
    """A factor without the other, in the last layer: the layers before it must not have been summed."""
    rule, made = get_rule(name), clients(name, [3, 3, 3], SHAPES)
    shared = {} if started == "from nothing" else run(rule, made)
    if (
        started == "from B alone"
    ):  # as with independently drawn A, where B = 0 is all that clients have in common
        shared = {key: tensor for key, tensor in shared.items() if "lora_A" not in key}
    expected = run(rule, [made[0], made[2]], shared)
    rule.start(shared, 1)
    for order, client in enumerate((made[0], made[1], made[2])):
        update = client.update(rule)
        for missing in sorted(update.tensors):
            lone = {key: tensor for key, tensor in update.tensors.items() if key != missing}
            with pytest.raises(FederationError, match=rf"{client.name}.*{missing} missing"):
                rule.add(dataclasses.replace(update, tensors=lone))
        if order != 1:
            rule.add(update)
    after = rule.finish()
    assert all(torch.equal(after[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", AGGREGATING)
def test_a_shared_head_must_come_with_the_first_update_too(name):
    rule, made = get_rule(name, also_share=["score.weight"]), clients(name, [3], SHAPES)
    rule.start({}, 1)
    with pytest.raises(FederationError, match=r"score\.weight missing"):
        rule.add(made[0].update(rule))


@pytest.mark.parametrize("name", AGGREGATING)
def test_what_is_expected_is_told_in_part_by_the_shared_state(name):
    """A head alone, or one factor of a layer, is no reason to refuse the rest; a further layer is."""
    rule, made = get_rule(name, also_share=["score.weight"]), clients(name, [3], SHAPES)
    made[0].state["score.weight"] = torch.ones(2, dtype=torch.float64)
    rule.start({"score.weight": torch.zeros(2)}, 1)
    rule.add(made[0].update(rule))
    rule.finish()
    rule.start({key: tensor for key, tensor in run(rule, made).items() if "lora_A" not in key}, 1)
    update = made[0].update(rule)
    more = {key.replace("layers.0", "layers.7"): t for key, t in update.tensors.items()}
    if name != "fedsa-lora":  # it sends A alone, of which nothing is told here
        with pytest.raises(FederationError, match=r"layers\.7.*not expected"):
            rule.add(dataclasses.replace(update, tensors={**update.tensors, **more}))
    rule.add(update)
    rule.finish()


FOREIGN = [
    "lora_A", "lora_B", "braidlora_router", "base_layer", "factoredlora_A", "factoredlora_M", "lora_B.default",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "foreign"),
    [(name, foreign) for name in RULE_NAMES for foreign in FOREIGN if foreign not in spec_of(name).uploads],
)
def test_foreign_tensors_may_not_travel(name, foreign):
    rule = get_rule(name)
    made = clients(name, [3], SHAPES)
    update = made[0].update(rule)
    tensor_name = f"base_model.model.layers.0.q_proj.{foreign}.weight"
    rule.start({}, 1)
    with pytest.raises(FederationError, match=rf"{foreign}.weight may not be sent; this rule accepts"):
        rule.add(dataclasses.replace(update, tensors={**update.tensors, tensor_name: torch.zeros(3, 12)}))


@pytest.mark.parametrize("name", EQUAL)
def test_unequal_ranks(name):
    rule, made = get_rule(name), clients(name, [3, 5], SHAPES)
    rule.start({}, 1)
    rule.add(made[0].update(rule))
    with pytest.raises(FederationError, match=r"rank 5.*needs equal ranks; zero-padding, flora"):
        rule.add(made[1].update(rule))
    with pytest.raises(FederationError, match=r"needs equal ranks"):
        rule.add(made[1].update(rule, rank=0))
    with pytest.raises(FederationError, match=r"must have rank 3; the update says rank 5"):
        rule.add(made[0].update(rule, rank=5))


@pytest.mark.parametrize("name", ["zero-padding", "flora", "flexlora", "raflora", HET])
def test_the_rank_that_an_update_claims(name):
    rule, made = get_rule(name), clients(name, [3], SHAPES)
    rule.start({}, 1)
    with pytest.raises(FederationError, match=r"rank 3 for 4"):
        rule.add(made[0].update(rule, rank=4))
    torn = made[0].update(rule, rank=0)
    part = "lora_B" if name != HET else "factoredlora_B2"
    with pytest.raises(FederationError, match=r"rank 2 for 3|other factor rank"):
        rule.add(change(torn, **{part: lambda t: t[:, :2]}))
    rule.add(torn)


def test_factors_of_one_update_must_have_one_rank_in_the_first_update_too():
    rule, made = get_rule("fedit"), clients("fedit", [3], SHAPES)
    rule.start({}, 1)
    with pytest.raises(FederationError, match="rank 2, the layer's other factor rank 3"):
        rule.add(change(made[0].update(rule, rank=0), lora_B=lambda t: t[:, :2]))


@pytest.mark.parametrize("name", [*EQUAL, "zero-padding", HET])
def test_rules_that_average_factors_need_one_scaling(name):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES, scaling=[2.0, 1.0])
    rule.start({}, 1)
    rule.add(made[0].update(rule))
    with pytest.raises(
        FederationError, match=r"'client001'.*scaling is 1, that of client 'client000' is 2.*alpha / r"
    ):
        rule.add(made[1].update(rule))


@pytest.mark.parametrize("name", ["flora", "flexlora", "raflora", "local"])
def test_other_rules_allow_scalings_to_differ(name):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES, scaling=[2.0, 1.0])
    rule.start({}, 1)
    for client in made:
        rule.add(client.update(rule))
    rule.finish()


@pytest.mark.parametrize("name", AGGREGATING)
def test_a_round_without_clients(name):
    rule = get_rule(name)
    rule.start({}, 1)
    with pytest.raises(FederationError, match="keep the shared state of the last round"):
        rule.finish()


@pytest.mark.parametrize("name", AGGREGATING)
def test_calls_out_of_order(name):
    rule, made = get_rule(name), clients(name, [3], SHAPES)
    with pytest.raises(FederationError, match=r"call start\(shared\)"):
        rule.add(made[0].update(rule))
    run(rule, made)
    with pytest.raises(FederationError, match=r"call start\(shared\)"):
        rule.finish()


def test_unknown_rules_and_settings():
    with pytest.raises(ConfigError, match=r"'fed-alora-hat'; did you mean 'fed-alora-het'\?.*local, fedit"):
        get_rule("fed-alora-hat")
    with pytest.raises(ConfigError, match=r"'fedit' has no setting wire; it has aggregator, also_share"):
        get_rule("fedit", wire="factors")
    with pytest.raises(ConfigError, match="'factors' or 'smallest'"):
        get_rule(HET, wire="tiny")
    with pytest.raises(ConfigError, match="shares nothing"):
        get_rule("local", also_share=["score.weight"])


@pytest.mark.parametrize("name", ["local", "zero-padding", "flora", "flexlora"])
def test_rules_without_robust_aggregators(name):
    with pytest.raises(ConfigError, match=r"cannot use CoordinateMedian.*one shape"):
        get_rule(name, aggregator=CoordinateMedian())


@pytest.mark.parametrize("name", AGGREGATING)
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, True, "3", 1e17])
def test_weights_in_place_of_rows(name, weight):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES)
    expected = run(rule, made[:1])
    rule.start({}, 1)
    rule.add(made[0].update(rule))
    with pytest.raises(FederationError, match=r"'client001'.*weight is .*above 0"):
        rule.add(made[1].update(rule), weight)
    after = rule.finish()
    assert all(torch.equal(after[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", AGGREGATING)
def test_numbers_of_numpy_are_numbers(name):
    rule, made = get_rule(name), clients(name, [3], SHAPES)
    update = made[0].update(rule)
    rule.start({}, 1)
    rule.add(dataclasses.replace(update, num_examples=np.int64(7), rank=np.int32(3), scaling=np.float32(2)))
    rule.finish()


MULTIPLYING = ["flora", "flexlora", HET]


@pytest.mark.parametrize("name", MULTIPLYING)
@pytest.mark.parametrize("value", [1e22, 3e38])
def test_finite_factors_with_an_infinite_product(name, value):
    """Every value is finite; B A is not, and one such client would make the whole aggregate so."""
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES)
    expected = run(rule, made[:1], dtype=torch.float32)
    huge = dataclasses.replace(
        made[1].update(rule, torch.float32),
        tensors={n: torch.full(t.shape, value) for n, t in made[1].update(rule).tensors.items()},
    )
    rule.start({}, 1)
    rule.add(made[0].update(rule, torch.float32))
    with pytest.raises(
        FederationError, match=r"'client001'.* has values of size .*; expected at most 1e\+09"
    ):
        rule.add(huge)
    after = rule.finish()
    assert all(torch.equal(after[key], expected[key]) for key in expected)


def test_a_norm_clip_is_not_passed_by_an_infinite_product():
    made = clients(HET, [3, 3], SHAPES, m=5)
    rule = get_rule(HET, aggregator=NormClip(1.0))
    for name in made[1].state:
        made[1].state[name] = torch.full_like(made[1].state[name], 9e8)  # the largest that is let through
    shared = run(rule, made, dtype=torch.float32)
    assert math.sqrt(sum(float(t.double().square().sum()) for t in shared.values())) <= 1.0 + 1e-6


@pytest.mark.parametrize("name", [*EQUAL, "zero-padding"])
def test_a_sum_that_overflows_does_not_become_the_shared_state(name):
    rule, made = get_rule(name), clients(name, [3, 3], SHAPES)
    for client, sign in zip(made, (3e38, -3e38), strict=True):
        client.state = {n: torch.full_like(t, sign).float() for n, t in client.state.items()}
    with pytest.raises(FederationError, match=r"aggregate is not: .*Keep the shared state of the last round"):
        run(rule, made)
    run(rule, made[:1])


def test_large_finite_values_are_no_infinity():
    """Their sum overflows; they do not."""
    rule, made = get_rule("fed-alora"), clients("fed-alora", [3], SHAPES)
    made[0].state = {name: torch.full_like(t, 3e38).float() for name, t in made[0].state.items()}
    assert all((tensor == 3e38).all() for tensor in run(rule, made).values())


MANY = [AdaptedLayer(f"base_model.model.layers.{j}.q_proj", 14, 12) for j in range(40)]
WRONG = {
    "dtype": lambda t: t.half(),
    "nan": lambda t: torch.full_like(t, math.nan),
    "rank": lambda t: torch.zeros([5 if size == 3 else size for size in t.shape]),
    "shape": lambda t: t[:1],
    "flat": lambda t: t.flatten(),
    "list": lambda t: t.tolist(),
    "all": lambda t: torch.full(
        [7 if size == 3 else size for size in t.shape], math.nan, dtype=torch.float16
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", AGGREGATING)
def test_a_refusal_names_a_tensor_once_for_one_fault_and_only_some_of_many(name, wrong):
    """By the guard and by the rule; a model has hundreds of tensors."""
    rule, made = get_rule(name, r_intermediate=5), clients(name, [3, 3], [(14, 12)] * 40)
    guard = Guard(rule, MANY, {"client000": 3, "client001": 3}, dtype=torch.float32)
    guard.open(1, ["client000"])
    good = made[0].update(rule, torch.float32, round=1)
    bad = dataclasses.replace(good, tensors={key: WRONG[wrong](t) for key, t in good.tensors.items()})
    said = []
    with pytest.raises(FederationError) as refused:
        guard.check(bad)
    said.append(str(refused.value))
    rule.start({}, 1)
    rule.add(made[1].update(rule, torch.float32))
    if wrong != "dtype":  # a rule takes any float
        for rank in (3,) if wrong == "rank" and name not in EQUAL else (3, 5, 0):
            with pytest.raises(FederationError) as refused:
                rule.add(dataclasses.replace(bad, rank=rank))
            said.append(str(refused.value))
    faults = 2 if wrong == "all" else 1  # values or type, and shape
    for text in said:
        for key in good.tensors:
            assert text.count(key) <= faults, text
        assert len(text) < faults * 800
        assert "more" in text


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        ({"client": ["c3"]}, "client is a list; expected its name"),
        ({"client": 3}, "client is a int; expected its name"),
        ({"tensors": None}, "tensors is a NoneType; expected tensors by name"),
        ({"tensors": [1]}, "tensors is a list; expected tensors by name"),
        ({"tensors": {3: torch.zeros(2)}}, "3 given as names of tensors; expected text"),
    ],
)
@pytest.mark.parametrize("through", ["rule", "guard"])
def test_what_cannot_be_looked_at_is_refused_like_anything_else(strange, message, through):
    update = dataclasses.replace(ClientUpdate("c3", 5, {}, rank=4, round=1), **strange)
    rule = get_rule("fed-alora")
    rule.start({}, 1)
    guard = Guard(rule, [AdaptedLayer("q", 3, 4)], {"c3": 4})
    guard.open(1, ["c3"])
    with pytest.raises(FederationError, match=message):
        rule.add(update) if through == "rule" else take(guard, update)


def test_a_tensor_without_values_is_refused():
    rule = get_rule("fed-alora")
    rule.start({}, 1)
    with pytest.raises(FederationError, match="meta device"):
        rule.add(ClientUpdate("c3", 5, {"q.lora_B.weight": torch.zeros(3, 4, device="meta")}, rank=4))

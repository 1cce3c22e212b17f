"""Clipping and noise against float64 numpy, under every rule that has a guarantee; and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from seven_clients import COUNT, HEAD, LAYERS, Round, recipe
from synthetic import HET

from braidlora.federated import RULE_NAMES
from braidlora.federated.protocol.client import sent
from braidlora.federated.protocol.entropy import SeededEntropy, SystemEntropy, normal, poisson_sample
from braidlora.federated.protocol.factors import join, split
from braidlora.federated.protocol.privacy import Mechanism, changes_of, clip, private_update
from braidlora.federated.protocol.rules import spec_of

PRIVATE = ("fedit", "ffa-lora", "fedsa-lora", "fed-alora", "rolora", HET)
WITHOUT = sorted(set(RULE_NAMES) - set(PRIVATE))


def private(rule, section=None, **options):
    section = {"clip": 1.0, "noise_multiplier": 0.0, "delta": 1e-2, **(section or {})}
    return recipe(rule, **{"weights": "uniform", "privacy": section, **options})


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def sums(rule, update):
    """What of an update is summed, by the name in the shared state: B2 B1 for the heterogeneous rule."""
    if rule != HET:
        return dict(update.tensors)
    found = {name: t for name, t in update.tensors.items() if name == HEAD}
    for layer in LAYERS:
        B1, B2 = (update.tensors[join(layer.name, f"factoredlora_{f}")].double() for f in ("B1", "B2"))
        found[join(layer.name, "factoredlora_base")] = B2 @ B1
    return found


def expected(config, updates, before):
    """θ + Σ clip(Δᵢ) / (q N), in float64."""
    rule, section = config.federation.rule, config.federation.privacy
    sample = config.federation.sample
    count = COUNT * (sample.fraction if sample is not None else 1.0)
    total = {}
    for update in updates.values():
        changes = {
            name: t.double().numpy()
            - (0.0 if rule == HET and name != HEAD else before[name].double().numpy())
            for name, t in sums(rule, update).items()
        }
        norm = math.sqrt(sum((change**2).sum() for change in changes.values()))
        for name, change in changes.items():
            total[name] = total.get(name, 0.0) + change * min(1.0, section.clip / norm)
    return {name: before[name].double().numpy() + change / count for name, change in total.items()}


@pytest.mark.parametrize("share_head", [False, True])
@pytest.mark.parametrize("limit", [0.4, 50.0])
@pytest.mark.parametrize("rule", PRIVATE)
def test_the_joint_change_is_clipped_and_divided_by_the_expected_number(rule, limit, share_head):
    config = private(
        rule, {"clip": limit, "seed": 3}, share_head=share_head, sample={"fraction": 0.6}, ranks=None
    )
    federation = Round(config)
    for number in (1, 2, 3):
        before = dict(federation.server.state().shared or federation.server._start)
        why_not, updates = federation.run(number)
        assert why_not == ""
        assert 0 < len(updates) < COUNT
        after = federation.server.state().shared
        wanted = expected(config, updates, before)
        assert (HEAD in wanted) == share_head, "a shared head is part of what is clipped"
        for name, value in wanted.items():
            np.testing.assert_allclose(after[name].double().numpy(), value, atol=2e-6, rtol=0)
        for name in after.keys() - wanted.keys():  # the other factor of a rule that alternates
            assert torch.equal(after[name], before[name])
        assert federation.server.clipped == (len(updates) if limit < 1 else 0)
        assert federation.server.state().weights == {}, "shares would tell how many took part"
        assert all(federation.server.payload(name, number + 1).weight is None for name in federation.clients)


def test_different_ranks_of_the_heterogeneous_rule():
    config = private(HET, {"clip": 0.5}, ranks=[2, 4, 1, 3, 4, 2, 1])
    federation = Round(config)
    before = dict(federation.server._start)
    _, updates = federation.run(1)
    for name, value in expected(config, updates, before).items():
        np.testing.assert_allclose(federation.server.state().shared[name], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("rule", PRIVATE)
def test_one_client_moves_the_sum_by_at_most_the_clip(rule, factor):
    """The sensitivity that the accountant assumes: with and without a client, however large its change."""
    config = private(rule, {"clip": 0.7}, share_head=True)
    _, updates = Round(config).run(1)
    big = {name: tensor * factor for name, tensor in updates["c3"].tensors.items()}
    updates["c3"] = replace(updates["c3"], tensors=big)

    def shared(names):
        server = Round(config).server
        server.open(1, server.sample(1))
        for name in names:
            server.take(updates[name])
        assert server.close() == ""
        return {name: tensor.double() for name, tensor in server.state().shared.items()}

    whole, without = shared(updates), shared(updates.keys() - {"c3"})
    moved = math.sqrt(sum(float(((whole[name] - without[name]) ** 2).sum()) for name in whole)) * COUNT
    assert 0.0 < moved <= 0.7 * (1 + 1e-5)
    if factor > 1:
        assert moved == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize("rule", PRIVATE)
def test_the_noise_has_the_deviation_that_the_accountant_assumes(rule):
    """By chi-square over all values that travel: σ of the sum is z C, and so z C / (q N) in the shared state."""
    z, C, q = 1.7, 0.3, 0.5
    outcomes = []
    for multiplier in (0.0, z):
        config = private(
            rule,
            {"clip": C, "noise_multiplier": multiplier, "seed": 5},
            share_head=True,
            sample={"fraction": q},
        )
        federation = Round(config)
        federation.run(1)
        outcomes.append(federation.server.state().shared)
    plain, noisy = outcomes
    names = [n for n in plain if n == HEAD or split(n)[1] in ("lora_A", "lora_B", "factoredlora_base")]
    if rule == "rolora":  # A waits for its turn: no noise on what did not travel
        assert all(torch.equal(plain[n], noisy[n]) for n in names if "lora_A" in n)
        names = [n for n in names if "lora_A" not in n]
    noise = np.concatenate([(noisy[n].double() - plain[n].double()).numpy().ravel() for n in names])
    scaled = noise * (q * COUNT) / (z * C)
    n = len(scaled)
    assert stats.chi2.ppf(1e-4, n) < (scaled**2).sum() < stats.chi2.ppf(1 - 1e-4, n)
    assert abs(scaled.mean()) < 4 / math.sqrt(n)


def test_a_round_without_clients_is_noise_alone():
    config = private(
        "fedit", {"clip": 1.0, "noise_multiplier": 2.0, "seed": 1}, sample={"fraction": 0.01}, share_head=True
    )
    federation = Round(config)
    number = next(n for n in range(1, 50) if not federation.server.sample(n))
    before = dict(federation.server._start)
    why_not, updates = federation.run(number)
    assert (why_not, updates) == ("", {})
    state = federation.server.state()
    assert state.shared_round == number, "a round that does not count would tell who was drawn"
    moved = np.concatenate(
        [(t.double() - before[n].double()).numpy().ravel() for n, t in state.shared.items()]
    )
    assert np.std(moved) == pytest.approx(2.0 / (0.01 * COUNT), rel=0.2)


def test_a_client_that_fails_counts_as_zero_and_changes_nothing_else():
    config = private("fed-alora", {"clip": 0.5, "seed": 1})
    federation = Round(config)
    server = federation.server
    before = dict(server._start)
    server.open(1, server.sample(1))
    host, updates = federation.host, {}
    from braidlora.federated import ClientUpdate

    for name in sorted(federation.clients)[:4]:
        own = {
            n: t + 0.1 for n, t in host.rule.outgoing(federation.states[name].tensors, 1).items() if n != HEAD
        }
        updates[name] = ClientUpdate(name, 5, own, 4, 2.0, 1, 1)
        server.take(updates[name])
    assert server.settle() == {}
    assert server.close() == ""
    for name, value in expected(config, updates, before).items():  # divided by all 7
        np.testing.assert_allclose(server.state().shared[name], value, atol=2e-6, rtol=0)


def test_no_client_is_rejected_by_comparison_with_others():
    """One client's change must not decide whether another one's counts."""

    def spoil(update):
        if update.client != "c2":
            return update
        return replace(update, tensors={n: 1e6 * (t + 1) for n, t in update.tensors.items()})

    federation = Round(private("fed-alora", {"clip": 0.5, "seed": 1}))
    federation.run(1, spoil)
    assert federation.left_out == {}
    plain = Round(recipe("fed-alora"))
    plain.run(1, spoil)
    assert set(plain.left_out) == {"c2"}


def test_momentum_continues_from_the_noisy_aggregate():
    """FedAvgM works on what was released already, so it costs nothing: θ − η v with v from the noisy mean."""
    section = {"clip": 0.5, "noise_multiplier": 1.0, "seed": 2}
    plain, moving = (
        Round(private("fedit", section, **more))
        for more in ({}, {"server_momentum": 0.9, "server_learning_rate": 0.5})
    )
    for one in (plain, moving):
        one.run(1)
    before = plain.server._start
    for name, mean in plain.server.state().shared.items():
        start = before[name].double()
        torch.testing.assert_close(
            moving.server.state().shared[name].double(),
            start - 0.5 * (start - mean.double()),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize("rule", [rule for rule in PRIVATE if rule != HET])
def test_a_client_clips_and_adds_noise_before_it_sends(rule):
    config = private(rule, {"clip": 0.5, "noise_multiplier": 0.8, "noise": "clients", "seed": 9})
    federation = Round(config)
    host = federation.host
    start = federation.states["c1"].tensors
    own = {n: t + 0.3 for n, t in start.items()}
    got = sent(host, own, 1, start=start, client="c1")
    plain = host.rule.outgoing(own, 1)
    assert got.keys() == plain.keys()
    norm = math.sqrt(sum(0.3**2 * t.numel() for t in plain.values()))
    noise = np.concatenate(
        [
            (got[n].double() - start[n].double()).numpy().ravel() - 0.3 * 0.5 / norm
            for n in sorted(got)
        ]
    )  # fmt: skip
    n = len(noise)
    assert stats.chi2.ppf(1e-4, n) < ((noise / 0.4) ** 2).sum() < stats.chi2.ppf(1 - 1e-4, n)
    again = sent(host, own, 1, start=start, client="c1")
    other, later = sent(host, own, 1, start=start, client="c2"), sent(host, own, 3, start=start, client="c1")
    name = next(iter(got))
    assert torch.equal(got[name], again[name])
    assert not torch.equal(got[name], other[name])
    assert not torch.equal(got[name], later[name])


def test_the_server_sums_what_clients_have_made_noisy_as_it_comes():
    config = private(
        "fed-alora", {"clip": 0.1, "noise_multiplier": 5.0, "noise": "clients"}, sample={"fraction": 1.0}
    )
    federation = Round(config)
    before = dict(federation.server._start)
    _, updates = federation.run(1)
    for name in next(iter(updates.values())).tensors:
        mean = sum(one.tensors[name].double() for one in updates.values()) / COUNT
        torch.testing.assert_close(
            federation.server.state().shared[name].double(),
            before[name].double() + mean - before[name].double(),
            atol=2e-6,
            rtol=0,
        )
    assert federation.server.clipped is None


def test_the_noise_of_the_operating_system_is_normal_and_never_the_same():
    values = normal(SystemEntropy(), 200_000)
    assert stats.kstest(values, "norm").pvalue > 1e-5
    assert not np.array_equal(values[:100], normal(SystemEntropy(), 100))
    assert np.isfinite(normal(SystemEntropy(), 2**20 + 5)).all(), "drawn in parts"
    for _ in range(3):  # the federation's seed does not determine it
        one, two = (Round(private("fed-alora", {"noise_multiplier": 1.0, "clip": 1.0})) for _ in range(2))
        one.run(1), two.run(1)
        assert not np.array_equal(flat(one.server.state().shared), flat(two.server.state().shared))


def test_seeded_noise_is_the_same_every_time_and_another_in_every_round():
    section = {"noise_multiplier": 1.0, "clip": 1.0, "seed": 4}
    one, two = (Round(private("fed-alora", section, sample={"fraction": 0.5})) for _ in range(2))
    for number in (1, 2):
        one.run(number), two.run(number)
        assert np.array_equal(flat(one.server.state().shared), flat(two.server.state().shared))
    a, b = (normal(SeededEntropy(4, "noise", number), 1000) for number in (1, 2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    assert stats.kstest(normal(SeededEntropy(4), 50_000), "norm").pvalue > 1e-5


def test_each_client_is_drawn_by_itself():
    """Poisson sampling: the number of clients is binomial, and draws are independent."""
    names = [f"c{i}" for i in range(50)]
    mechanism = Mechanism(1.0, 1.0, 0.3, 50)
    drawn = np.array(
        [[n in found for n in names] for found in (mechanism.sample(names, 1) for _ in range(800))]
    )
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(50 * 0.3 * 0.7, rel=0.25)
    assert drawn.mean() == pytest.approx(0.3, abs=0.015)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.15
    assert poisson_sample(SystemEntropy(), names, 1.0) == names


def test_clip_against_numpy():
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(5, 4, generator=generator) for n in "ab"}
    tensors = {n: torch.randn(5, 4, generator=generator) for n in "abc"}
    reference = {
        n: tensors[n].double().numpy() - (start[n].double().numpy() if n in start else 0) for n in "abc"
    }
    length = np.linalg.norm(np.concatenate([one.ravel() for one in reference.values()]))
    changes, norm = changes_of(tensors, start)
    assert norm == pytest.approx(length, rel=1e-14)
    for limit in (2 * length, length / 3):
        changes, norm = changes_of(tensors, start)
        clip(changes, norm, limit)
        for name, change in changes.items():
            np.testing.assert_allclose(change, reference[name] * min(1, limit / length), atol=1e-15)
    untouched = {n: t.clone() for n, t in tensors.items()}
    private_update({n: tensors[n] for n in "ab"}, start, Mechanism(0.1, 1.0, 1.0, 1), "x", 1)
    assert all(torch.equal(untouched[n], tensors[n]) for n in tensors), "the client's own state is not noisy"


def refusal(rule, section=None, **options):
    with pytest.raises(ValidationError) as caught:
        private(rule, section, **options)
    return "\n".join(str(one["msg"]) for one in caught.value.errors())


@pytest.mark.parametrize("rule", WITHOUT)
def test_rules_without_a_guarantee_are_refused_with_the_reason(rule):
    said = refusal(rule, weights="uniform" if rule != "local" else "rows")
    assert f"there is no guarantee for {rule}: {spec_of(rule).no_privacy}" in said
    assert "works with fedit, ffa-lora" in said


@pytest.mark.parametrize(
    ("section", "options", "says"),
    [
        ({}, {"weights": "rows"}, "no guarantee with weights by rows"),
        ({}, {"weights": "steps"}, "no guarantee with weights by steps"),
        ({}, {"sample": {"number": 3}}, "sample of fixed size"),
        ({}, {"robust": {"aggregator": "median"}}, "no guarantee with median"),
        ({}, {"robust": {"aggregator": "norm-clip", "max_norm": 1.0}}, "no guarantee with norm-clip"),
        ({}, {"robust": {"aggregator": "krum", "f": 1}}, "no guarantee with krum"),
        ({}, {"change_cap": 10.0}, "comparing it with others"),
        ({}, {"share_cap": 0.5}, "same weight"),
        ({}, {"min_clients": 2}, "how many clients were drawn"),
        ({}, {"quorum": 0.5}, "how many clients were drawn"),
        ({}, {"client_init": "independent"}, "starts from its own values"),
        ({"epsilon": 3.0}, {}, "either epsilon or noise_multiplier"),
        ({"noise_multiplier": None}, {}, "either epsilon or noise_multiplier"),
        ({"delta": 0.2}, {}, "with 7 clients: a δ of 1 / 7 or more"),
        ({"noise": "clients", "noise_multiplier": None, "epsilon": 3.0}, {}, "depends on how many clients"),
    ],
)  # fmt: skip
def test_settings_without_a_guarantee_are_refused_with_the_reason(section, options, says):
    assert says in refusal("fedit", section, **options)


def test_noise_on_factors_whose_product_counts_is_refused():
    assert "noise on each would not be noise on their product" in refusal(HET, {"noise": "clients"})


def test_what_does_not_touch_the_guarantee_is_allowed():
    private("fed-alora", client_init="independent")  # only B travels, and starts at zero
    private("fedit", proximal_mu=0.1, server_momentum=0.5, upload_dtype="bfloat16", change_cap=None)
    private("fedsa-lora", state="reset-each-round", optimizer_state="restart")


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_extreme_bits_give_finite_noise(byte, monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", lambda count: byte * count)
    uniform = SystemEntropy().uniform(3)
    assert ((uniform > 0.0) & (uniform < 1.0)).all()
    assert np.isfinite(normal(SystemEntropy(), 3)).all()

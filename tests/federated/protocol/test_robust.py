"""Liars among the clients: the mean breaks, the robust aggregators stay bounded."""

import math

import numpy as np
import pytest
import torch
from synthetic import EQUAL, HET, clients, layers, run

from braidlora.errors import ConfigError, FederationError
from braidlora.federated import ClientUpdate, get_rule
from braidlora.federated.protocol.mean import WeightedMean
from braidlora.federated.protocol.robust import CoordinateMedian, Krum, NormClip, TrimmedMean, get_aggregator

SHAPES = [(14, 12), (9, 16)]


def aggregate(aggregator, values, reference=None, weights=None):
    """Of one-tensor clients."""
    aggregator.start({} if reference is None else {"t": reference})
    for i, value in enumerate(values):
        aggregator.add({"t": value}, 1.0 if weights is None else weights[i])
    return aggregator.finish()["t"]


def random_values(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_median(n):
    values = random_values(n)
    np.testing.assert_allclose(
        aggregate(CoordinateMedian(), values), np.median(np.stack(values), 0), atol=1e-12
    )


@pytest.mark.parametrize(
    ("n", "trim", "cut"), [(10, 0.3, 3), (10, 0.0, 0), (7, 0.3, 2), (100, 0.29, 29), (3, 0.4, 1)]
)
def test_trimmed_mean(n, trim, cut):
    values = random_values(n)
    expected = np.sort(np.stack(values), 0)[cut : n - cut].mean(0)
    np.testing.assert_allclose(aggregate(TrimmedMean(trim), values), expected, atol=1e-12)


def test_norm_clip_is_of_the_change():
    start = torch.full((4, 3), 100.0, dtype=torch.float64)
    changes = random_values(3)
    changes[1] = changes[1] / changes[1].norm() * 50.0
    values = [start + change for change in changes]
    got = aggregate(NormClip(5.0), values, start, [1.0, 2.0, 3.0])
    clipped = [c * min(1.0, 5.0 / c.norm().item()) for c in changes]
    expected = start + (clipped[0] + 2 * clipped[1] + 3 * clipped[2]) / 6
    torch.testing.assert_close(got, expected)
    assert (got - start).norm() <= 5.0


def test_norm_clip_counts_all_tensors_of_a_client_together():
    clip = NormClip(1.0)
    clip.start({})
    clip.add({"a": torch.full((1,), 3.0), "b": torch.full((1,), 4.0)}, 1.0)
    result = clip.finish()
    assert (result["a"].item(), result["b"].item()) == pytest.approx((0.6, 0.8))


def test_norm_clip_composes():
    values = [torch.full((1,), v) for v in (0.1, 0.2, 0.3, 1e6, 1e6)]
    assert aggregate(NormClip(0.25, TrimmedMean(0.4)), values).item() == pytest.approx(0.25)


@pytest.mark.parametrize("keep", [1, 3])
def test_krum_against_its_definition(keep):
    values = random_values(9) + [torch.full((4, 3), 40.0, dtype=torch.float64)] * 2
    f, n = 2, 11
    scores = []
    for i in range(n):
        distances = sorted(float((values[i] - values[j]).square().sum()) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    chosen = np.argsort(scores, kind="stable")[:keep]
    expected = sum(values[i] for i in chosen) / keep
    torch.testing.assert_close(aggregate(Krum(f, n, keep), values), expected)


def test_krum_of_large_common_offset_keeps_its_digits():
    values = [1e6 + value for value in random_values(7)]
    plain = [value - 1e6 for value in values]
    torch.testing.assert_close(aggregate(Krum(2, 7), values) - 1e6, aggregate(Krum(2, 7), plain))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Krum(2, 6),
            r"6 clients cannot tolerate f = 2; it needs at least 2f \+ 3 = 7 clients, or f of at most 1",
        ),
        (lambda: Krum(2, 3), "at least 2f"),
        (lambda: Krum(-1, 9), "0 or more"),
        (lambda: Krum(1, 9, keep=9), "between 1 and n − f = 8"),
        (lambda: Krum(1, 9, keep=0), "between 1"),
        (lambda: TrimmedMean(0.5), "below 0.5"),
        (lambda: TrimmedMean(-0.1), "at least 0"),
        (lambda: TrimmedMean(math.nan), "below 0.5"),
        (lambda: TrimmedMean(0.1, 8), r"0\.1 of 8 clients drops no client; trim must be at least 1 / 8"),
        (lambda: get_aggregator("trimmed-mean", trim=0.2, clients=4), "drops no client"),
        (lambda: NormClip(0.0), "above 0"),
        (lambda: NormClip(math.inf), "finite"),
        (lambda: get_aggregator("bulyan"), "expected one of mean, norm-clip, median"),
        (lambda: get_aggregator("krum", f=1), "clients"),
        (lambda: get_aggregator("median", trim=0.1), "trim"),
    ],
)
def test_infeasible_settings_are_refused_when_made(make, said):
    with pytest.raises(ConfigError, match=said) as error:
        make()
    assert error.value.exit_code == 2


def test_krum_with_too_few_replies():
    with pytest.raises(FederationError, match=r"f = 2 needs at least 7 clients in a round; 6 took part"):
        aggregate(Krum(2, 10), random_values(6))


@pytest.mark.parametrize(("trim", "n"), [(0.3, 3), (0.1, 9), (0.4999999999, 2)])
def test_trimmed_mean_with_too_few_replies(trim, n):
    """It would be the plain mean, without a word."""
    with pytest.raises(FederationError, match=rf"drops none of the {n} clients.*min_clients"):
        aggregate(TrimmedMean(trim), random_values(n))


def test_settings_that_just_suffice():
    assert aggregate(TrimmedMean(0.125, 8), [torch.full((1,), float(v)) for v in range(8)]).item() == 3.5
    assert aggregate(TrimmedMean(0.0, 1), [torch.full((1,), 7.0)]).item() == 7.0
    assert aggregate(Krum(1, 5), random_values(5)).shape == (4, 3)


@pytest.mark.parametrize("n", [3, 4])
def test_median_of_large_values_is_finite(n):
    assert aggregate(CoordinateMedian(), [torch.full((1,), 3e38)] * n).item() == pytest.approx(3e38)


@pytest.mark.parametrize("name", ["fedit", "fedsa-lora"])
def test_norm_clip_needs_the_start_of_a_factor_that_does_not_start_at_zero(name):
    """Measured from zero, a clipped A would shrink towards zero."""
    made = clients(name, [3, 3], SHAPES)
    rule = get_rule(name, aggregator=NormClip(0.1))
    with pytest.raises(FederationError, match=r"change of lora_A cannot be measured.*first round"):
        rule.start({})
    start = {n: t.clone() for n, t in rule.outgoing(made[0].state).items()}
    shared = run(rule, made, start)
    moved = math.sqrt(sum(float((shared[n] - start[n]).square().sum()) for n in start))
    assert 0.0 < moved <= 0.1 + 1e-9


@pytest.mark.parametrize("name", ["ffa-lora", "fed-alora", HET])
def test_norm_clip_of_what_starts_at_zero(name):
    made = clients(name, [3, 3], SHAPES)
    shared = run(get_rule(name, aggregator=NormClip(0.1)), made)
    norm = math.sqrt(sum(float(t.square().sum()) for t in shared.values()))
    assert 0.0 < norm <= 0.1 + 1e-9
    again = run(get_rule(name, aggregator=NormClip(0.1)), made, shared)
    step = math.sqrt(sum(float((again[n] - shared[n]).square().sum()) for n in shared))
    assert 0.0 < step <= 0.1 + 1e-9
    with_head = get_rule(name, aggregator=NormClip(0.1), also_share=["score.weight"])
    with pytest.raises(FederationError, match=r"change of score\.weight cannot be measured"):
        with_head.start(shared)


@pytest.mark.parametrize("name", ["mean", "median"])
def test_by_name(name):
    assert isinstance(get_aggregator(name), {"mean": WeightedMean, "median": CoordinateMedian}[name])


def attacked_round(name, kind, attackers, **settings):
    """10 clients whose changes are a common direction with noise; attackers send ten times the opposite.

    The norm clip is set to the norm of the common direction.

    Returns the error of the aggregate's change against the honest clients' mean change, relative to the latter.
    """
    generator = torch.Generator().manual_seed(0)
    uploads = get_rule(name).outgoing(clients(name, [3], SHAPES)[0].state, 1)
    start = {n: torch.randn(t.shape, generator=generator) for n, t in uploads.items()}
    direction = {n: torch.randn(t.shape, generator=generator) for n, t in uploads.items()}
    if kind == "norm-clip":
        settings["max_norm"] = math.sqrt(sum(float(t.square().sum()) for t in direction.values()))
    rule = get_rule(name, aggregator=get_aggregator(kind, **settings))
    updates, honest = [], []
    for i in range(10):
        change = {n: t + 0.5 * torch.randn(t.shape, generator=generator) for n, t in direction.items()}
        if i < attackers:
            change = {n: -10.0 * t for n, t in change.items()}
        else:
            honest.append(change)
        updates.append(ClientUpdate(f"c{i}", 50, {n: start[n] + t for n, t in change.items()}, 3, 2.0))
    rule.start(start, 1)
    for update in updates:
        rule.add(update)
    shared = rule.finish()
    truth = {n: sum(change[n] for change in honest) / len(honest) for n in start}
    error = sum(float((shared[n] - start[n] - truth[n]).square().sum()) for n in start)
    return math.sqrt(error / sum(float(t.square().sum()) for t in truth.values()))


# Relative errors of one round with 3 liars of 10 (sign flipped, ten times as large), rounded up.
BOUNDS = {
    "norm-clip": ({}, 0.75),
    "median": ({}, 0.6),
    "trimmed-mean": ({"trim": 0.3}, 0.6),
    "krum": ({"f": 3, "clients": 10}, 0.6),
    "multi-krum": ({"f": 3, "clients": 10, "keep": 4}, 0.3),
}


ROBUST = [name for name in EQUAL if get_rule(name).spec.robust]


@pytest.mark.parametrize("name", ROBUST)
def test_three_attackers_of_ten_break_the_mean(name):
    assert attacked_round(name, "mean", 0) < 1e-5
    assert attacked_round(name, "mean", 3) > 3.0


@pytest.mark.parametrize("aggregator", BOUNDS)
@pytest.mark.parametrize("name", ROBUST)
def test_three_attackers_of_ten_are_withstood(name, aggregator):
    settings, bound = BOUNDS[aggregator]
    assert attacked_round(name, aggregator, 3, **settings) < bound


def attacked_heterogeneous_round(kind, attackers, **settings):
    """As `attacked_round`, with clients of different ranks; the changes are their products B2 B1 (20 × 5)."""
    generator = torch.Generator().manual_seed(0)
    start, direction = (torch.randn(20, 5, generator=generator) for _ in range(2))
    if kind == "norm-clip":
        settings["max_norm"] = float(direction.norm())
    rule = get_rule(HET, aggregator=get_aggregator(kind, **settings))
    rule.start({"l.factoredlora_base.weight": start})
    honest = []
    for i in range(10):
        rank = 5 + i
        B1 = torch.randn(rank, 5, generator=generator)
        wanted = direction + 0.5 * torch.randn(20, 5, generator=generator)
        B2 = wanted @ torch.linalg.pinv(B1)
        honest += [B2 @ B1] if i >= attackers else []
        factors = {"B1": B1, "B2": -10.0 * B2 if i < attackers else B2}
        tensors = {f"l.factoredlora_{name}.weight": tensor for name, tensor in factors.items()}
        rule.add(ClientUpdate(f"c{i}", 50, tensors, rank, 2.0))
    change, truth = rule.finish()["l.factoredlora_base.weight"] - start, sum(honest) / len(honest)
    return float((change - truth).norm() / truth.norm())


@pytest.mark.parametrize("aggregator", ["mean", *BOUNDS])
def test_three_attackers_of_ten_with_different_ranks(aggregator):
    if aggregator == "mean":
        assert attacked_heterogeneous_round("mean", 0) < 1e-4
        assert attacked_heterogeneous_round("mean", 3) > 3.0
        return
    settings, bound = BOUNDS[aggregator]
    assert attacked_heterogeneous_round(aggregator, 3, **settings) < bound


def test_robust_heterogeneous_rule_works_on_the_products():
    made = clients(HET, [3, 2, 5, 4, 3], SHAPES)
    rule = get_rule(HET, aggregator=CoordinateMedian())
    base = {
        f"{layer}.factoredlora_base.weight": torch.ones(d, 5)
        for layer, (d, _) in zip(layers(made[0].state), SHAPES, strict=True)
    }
    rule.start(base)
    products = {}
    for i, client in enumerate(made):
        update = client.update(rule)
        if i == 0:
            update = ClientUpdate(update.client, 1, {n: 1e6 * t for n, t in update.tensors.items()}, 3, 2.0)
        for layer in layers(made[0].state):
            B2, B1 = (update.tensors[f"{layer}.factoredlora_{f}.weight"] for f in ("B2", "B1"))
            products.setdefault(layer, []).append((B2 @ B1).numpy())
        rule.add(update)
    shared = rule.finish()
    for layer, values in products.items():
        expected = 1.0 + np.median(np.stack(values), 0)
        np.testing.assert_allclose(shared[f"{layer}.factoredlora_base.weight"], expected, atol=1e-9)

"""ε against numbers that are computed directly from the densities."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from braidlora.federated.protocol.accountant import Release, calibrated, check_accountant, spent

pytest.importorskip("dp_accounting", reason="needs dp-accounting")


def gaussian(multiplier, delta):
    """ε of one Gaussian mechanism, from its δ(ε) (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    mu = 1.0 / multiplier

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0.0, 200.0) if excess(0.0) > 0 else 0.0


def subsampled(z, q, rounds, delta):
    """ε of one or two Poisson-subsampled Gaussians, by integrating max(0, P − e^ε Q) both ways on a grid."""
    x = np.linspace(-8 * z - 1, 8 * z + 2, 3001)
    with_it, without = (1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, 1, z), norm.pdf(x, 0, z)
    step = x[1] - x[0]
    if rounds == 2:
        with_it, without = (np.multiply.outer(one, one).ravel() for one in (with_it, without))
        step **= 2

    def excess(epsilon):
        pairs = ((with_it, without), (without, with_it))
        return max(np.maximum(0, p - math.exp(epsilon) * r).sum() * step for p, r in pairs) - delta

    return brentq(excess, 0.0, 60.0, xtol=1e-6)


def central(z, q, count):
    return [Release(i + 1, "aggregate", z, q) for i in range(count)]


@pytest.mark.parametrize(("z", "count"), [(1.0, 1), (3.0, 10), (0.5, 4)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_every_client_in_every_round(z, count, delta):
    """T Gaussians with z are one with z / √T."""
    found = spent(central(z, 1.0, count), delta, at_clients=False)
    assert found.epsilon == pytest.approx(gaussian(z / math.sqrt(count), delta), rel=1e-4)
    assert found.epsilon_server is None
    assert found.neighbors == "add or remove one client"


def test_rounds_with_different_noise():
    releases = central(1.0, 1.0, 2) + central(2.0, 1.0, 3)
    total = 1 / math.sqrt(2 / 1.0 + 3 / 4.0)
    assert spent(releases, 1e-5, at_clients=False).epsilon == pytest.approx(gaussian(total, 1e-5), rel=1e-4)


@pytest.mark.parametrize(("z", "q", "rounds"), [(0.8, 0.5, 1), (1.5, 0.1, 1), (1.0, 0.3, 2), (2.0, 0.5, 2)])
def test_sampled_clients(z, q, rounds):
    found = spent(central(z, q, rounds), 1e-4, at_clients=False).epsilon
    direct = subsampled(z, q, rounds, 1e-4)
    assert direct * (1 - 1e-3) <= found <= direct * 1.01 + 1e-3, "tight, and an upper bound"


def test_sampling_amplifies_and_repetition_costs():
    few, all_ = (spent(central(1.0, q, 5), 1e-5, at_clients=False).epsilon for q in (0.1, 1.0))
    again = spent(central(1.0, 0.1, 6), 1e-5, at_clients=False).epsilon
    assert few < again < all_


def test_where_the_tight_accountant_would_take_minutes_the_bound_is_another_one():
    found = spent(central(0.05, 0.5, 5), 1e-5, at_clients=False).epsilon
    assert 1000 < found < 2000


def test_noise_at_the_clients_is_counted_for_the_one_that_spent_most():
    """The server sees 2 C / (z C) for each update of a client; others the noise of n − 1 clients of a round."""
    z, delta = 4.0, 1e-5
    rounds = [("a", "b", "c"), ("a", "b"), ("a",), ()]
    releases = []
    for number, names in enumerate(rounds, 1):
        releases.append(Release(number, "sent", z, 0.5, names))
        releases.append(Release(number, "aggregate", z, 0.5, names))
    found = spent(releases, delta, at_clients=True)
    assert found.epsilon_server == pytest.approx(gaussian(1 / math.sqrt(3 * (2 / z) ** 2), delta), rel=1e-4)
    seen = (2 / z) ** 2 * (1 / 2 + 1 / 1 + 1 / 1)  # of a: n − 1 of 3, of 2, and alone its own
    assert found.epsilon == pytest.approx(gaussian(1 / math.sqrt(seen), delta), rel=1e-4)
    assert found.epsilon < found.epsilon_server
    assert found.neighbors == "replace the rows of one client"
    assert found.releases == 4
    # An update that was sent and not summed is seen by the server alone.
    more = spent([*releases, Release(5, "sent", z, 0.5, ("a",))], delta, at_clients=True)
    assert more.epsilon == found.epsilon
    assert more.epsilon_server > found.epsilon_server


def test_no_guarantee():
    seeded = [Release(1, "aggregate", 1.0, 1.0, (), secret=False), *central(1.0, 1.0, 3)]
    assert "whoever knows the seed" in spent(seeded, 1e-5, at_clients=False).why_no_guarantee
    bare = spent(central(0.0, 1.0, 1), 1e-5, at_clients=False)
    assert bare.epsilon is None
    assert "no noise is added" in bare.why_no_guarantee
    assert spent([], 1e-5, at_clients=False).epsilon == 0.0


@pytest.mark.parametrize(("epsilon", "q", "rounds"), [(8.0, 1.0, 6), (2.0, 0.5, 8), (0.5, 0.2, 20)])
def test_the_noise_for_a_budget_is_enough_and_hardly_more(epsilon, q, rounds):
    z = calibrated(epsilon, 1e-4, q, rounds)
    assert spent(central(z, q, rounds), 1e-4, at_clients=False).epsilon <= epsilon
    assert spent(central(z * 0.995, q, rounds), 1e-4, at_clients=False).epsilon > epsilon


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    from braidlora.errors import ConfigError
    from braidlora.federated.protocol import accountant

    monkeypatch.setattr(accountant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'braidlora\[privacy\]'"):
        check_accountant()

"""The rule and the aggregator that a recipe names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.federated.protocol.accountant import calibrated
from braidlora.federated.protocol.mean import Aggregator
from braidlora.federated.protocol.privacy import Mechanism, NoisyMean, sampling_rate
from braidlora.federated.protocol.robust import get_aggregator
from braidlora.federated.protocol.rules import get_rule, spec_of
from braidlora.federated.protocol.rules.rule import Rule


def make_rule(
    config: FederatedConfig,
    head: Iterable[str] = (),
    aggregator: Aggregator | None = None,
    ranks: Collection[int] = (),
) -> Rule:
    """The recipe's rule.

    Args:
        head: names of the tensors that are trained in full, which travel with `share_head`.
        aggregator: replaces the mean; only a server needs it.
        ranks: of all clients; only a server needs them.
    """
    federation = config.federation
    of_ranks = {"max_rank": max(ranks, default=None), "levels": sorted(set(ranks)) or None}
    settings: dict[str, Any] = {
        name: of_ranks[name] if name in of_ranks else getattr(federation, name)
        for name in spec_of(federation.rule).settings
    }
    settings["r_intermediate"] = federation.r_intermediate
    if federation.share_head:
        settings["also_share"] = sorted(head)
    if aggregator is not None:
        settings["aggregator"] = aggregator
    return get_rule(federation.rule, **settings)


def make_mechanism(
    config: FederatedConfig, clients: int, noise_multiplier: float | None = None
) -> Mechanism | None:
    """What `federation.privacy` adds to a federation of so many clients; None without it.

    Args:
        noise_multiplier: the one that the federation began with; default: the recipe's, or the one that its ε requires.

    Raises:
        ConfigError: the accountant is not installed.
    """
    section, sampling = config.federation.privacy, sampling_rate(config)
    if section is None:
        return None
    z = section.noise_multiplier if noise_multiplier is None else noise_multiplier
    if z is None:
        assert section.epsilon is not None
        z = calibrated(section.epsilon, section.delta, sampling, config.federation.rounds)
    return Mechanism(section.clip, z, sampling, clients, section.noise == "clients", section.seed)


def make_aggregator(
    config: FederatedConfig, sampled: int, mechanism: Mechanism | None = None
) -> Aggregator | None:
    """The recipe's robust aggregator, or that of `federation.privacy`; None for the mean.

    Args:
        sampled: how many clients a round has.
        mechanism: of privacy.
    """
    if mechanism is not None:
        return NoisyMean(mechanism)
    robust = config.federation.robust
    if robust.aggregator == "mean":
        return None
    given = {key: getattr(robust, key) for key in ("max_norm", "trim", "f", "keep")}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if robust.f is not None or robust.trim is not None:
        settings["clients"] = sampled
    return get_aggregator(robust.aggregator, **settings)

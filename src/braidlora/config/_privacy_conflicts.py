"""Settings with which `federation.privacy` would have no guarantee, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from braidlora.federated.protocol.factors import ZERO_AT_START
from braidlora.federated.protocol.rules import rules_where, spec_of

if TYPE_CHECKING:
    from braidlora.config._conflicts import Problem
    from braidlora.config._federated import FederatedConfig


def privacy(config: FederatedConfig, clients: int | None) -> Iterator[Problem]:
    """What the accountant's guarantee does not cover; `clients` is None if their number depends on the data."""
    federation, section, key = config.federation, config.federation.privacy, "federation.privacy"
    if section is None:
        return
    spec = spec_of(federation.rule)
    if spec.no_privacy:
        works = rules_where(lambda one: not one.no_privacy)
        yield key, f"there is no guarantee for {spec.name}: {spec.no_privacy}. It works with {works}"
    if (section.epsilon is None) == (section.noise_multiplier is None):
        yield key, "give either epsilon or noise_multiplier"
    yield from _weights_and_rejections(config)
    if section.noise == "clients":
        yield from _noise_of_clients(config)
    drawn = set(spec.uploads) - ZERO_AT_START - set(spec.multiplies)  # uploaded, and not zero at the start
    if federation.client_init == "independent" and drawn and not spec.no_privacy:
        yield (
            "federation.client_init",
            f"privacy clips changes from a common start, but with `independent` every A of {spec.name} starts from its "
            "own values. Use client_init: shared",
        )
    if clients is not None and section.delta * clients >= 1.0:
        yield (
            f"{key}.delta",
            f"{section.delta:g} with {clients} clients: a δ of 1 / {clients} or more allows the data of a whole client "
            f"to be published. Choose one well below {1 / clients:.2g}",
        )


def _weights_and_rejections(config: FederatedConfig) -> Iterator[Problem]:
    """Settings through which one client affects the weight or the part of another, or the sample is not Poisson's."""
    federation = config.federation
    if federation.weights != "uniform":
        by = federation.weights
        yield (
            "federation.weights",
            f"privacy has no guarantee with weights by {by}: a client could count for more than its clip allows, and "
            f"its number of {by} would show. Use weights: uniform",
        )
    if federation.sample is not None and federation.sample.number is not None:
        yield (
            "federation.sample.number",
            "privacy has no guarantee with a sample of fixed size: the accountant assumes that every client is "
            "drawn by itself (Poisson sampling). Use sample.fraction",
        )
    if federation.robust.aggregator != "mean":
        yield (
            "federation.robust.aggregator",
            f"privacy has no guarantee with {federation.robust.aggregator}: the noise is computed for a mean of "
            "changes that privacy.clip bounds. Use mean",
        )
    for name, why in (
        (
            "change_cap",
            "it rejects a client by comparing it with others; privacy.clip bounds its change instead",
        ),
        ("share_cap", "all clients have the same weight"),
        ("min_clients", "whether a round counts would show how many clients were drawn"),
        ("quorum", "whether a round counts would show how many clients were drawn"),
    ):
        # change_cap has a default for federations without privacy, and null is what privacy does.
        if federation.is_given(name) and getattr(federation, name) is not None:
            yield f"federation.{name}", f"privacy does not allow it: {why}. Remove it"


def _noise_of_clients(config: FederatedConfig) -> Iterator[Problem]:
    section, spec, key = config.federation.privacy, spec_of(config.federation.rule), "federation.privacy"
    assert section is not None
    if spec.multiplies and not spec.no_privacy:
        works = rules_where(lambda one: not one.no_privacy and not one.multiplies)
        yield (
            f"{key}.noise",
            f"`clients` has no guarantee under {spec.name}: the server multiplies the factors that a client sends, and "
            f"noise on each would not be noise on their product. Use noise: server, or {works}",
        )
    if section.epsilon is not None:
        yield (
            f"{key}.epsilon",
            "with noise: clients, ε depends on how many clients take part in each round. Give noise_multiplier; "
            "rounds.jsonl has ε after every round",
        )

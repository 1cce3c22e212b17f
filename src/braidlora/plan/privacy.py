"""What a private recipe will have spent at its end, before anything runs."""

from __future__ import annotations

from typing import Any

from braidlora.config import FederatedConfig
from braidlora.errors import ConfigError
from braidlora.federated.protocol.accountant import Release, check_accountant, spent
from braidlora.federated.protocol.recipe import make_mechanism


def plan_privacy(config: FederatedConfig, clients: int) -> dict[str, Any] | None:
    """ε and the noise of a recipe with `federation.privacy`; None without it.

    With the noise at the clients, ε is that of a client that takes part in every round, among as many as are expected.

    Returns:
        `{"epsilon", "epsilon_server", "delta", "neighbors", "noise", "noise_multiplier", "clip", "sampling"}`, and
        `"why_not"` if there is no guarantee; or a `reason` if the accountant is not installed.
    """
    section = config.federation.privacy
    if section is None:
        return None
    try:
        check_accountant()
    except ConfigError as error:
        return {"reason": str(error)}
    mechanism = make_mechanism(config, clients)
    assert mechanism is not None
    z, q, secret = mechanism.noise_multiplier, mechanism.sampling, mechanism.seed is None
    names = tuple(map(str, range(max(1, round(mechanism.expected))))) if mechanism.at_clients else ()
    releases = [
        Release(round, what, z, q, names, secret)
        for round in range(1, config.federation.rounds + 1)
        for what in (("sent", "aggregate") if mechanism.at_clients else ("aggregate",))
    ]
    found = spent(releases, section.delta, at_clients=mechanism.at_clients)
    return {
        "epsilon": found.epsilon,
        "epsilon_server": found.epsilon_server,
        "delta": section.delta,
        "neighbors": found.neighbors,
        "noise": section.noise,
        "noise_multiplier": z,
        "clip": section.clip,
        "sampling": q,
        **({"why_not": found.why_no_guarantee} if found.why_no_guarantee else {}),
    }

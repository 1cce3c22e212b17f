"""Sampling that leaves out all clients of the largest rank, and what that does to the higher ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.rules.rule import Rule


def warn_of_forgotten_ranks(rule: Rule, clients: Mapping[str, ClientSpec], sampled: int) -> None:
    """Warn where sampling can draw a round without any client of the largest rank, and the rule then forgets ranks."""
    largest = max(client.rank for client in clients.values())
    lower = [client.rank for client in clients.values() if client.rank < largest]
    if not rule.forgets or len(lower) < sampled:
        return
    share = math.comb(len(lower), sampled) / math.comb(len(clients), sampled)
    warnings.warn(
        f"federation.sample draws {sampled} of {len(clients)} clients, and in {100 * share:.2g} % of the rounds none "
        f"of rank {largest}: {rule.spec.name} then {rule.forgets}",
        stacklevel=3,
    )

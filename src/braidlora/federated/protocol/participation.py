"""What it does to the higher ranks when only clients of lower ones take part in a round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from braidlora.config import FederationSection
from braidlora.federated.protocol.clients import ClientSpec


def warn_of_forgotten_ranks(
    federation: FederationSection, clients: Mapping[str, ClientSpec], asked: int
) -> None:
    """Warn where sampling can draw a round without any client of the largest rank, and the rule forgets by that."""
    forgets = (
        federation.rule == "zero-padding" and federation.padding == "zeros"
    ) or federation.rule == "flexlora"
    largest = max(client.rank for client in clients.values())
    lower = [client.rank for client in clients.values() if client.rank < largest]
    if not forgets or len(lower) < asked:
        return
    share = math.comb(len(lower), asked) / math.comb(len(clients), asked)
    what = (
        "sets the ranks above those that took part to zero for good; federation.padding=by-rank keeps them"
        if federation.rule == "zero-padding"
        else "replaces the shared update by theirs, and forgets what it held beyond their ranks; flora and "
        "fed-alora-het add up instead"
    )
    warnings.warn(
        f"federation.sample asks {asked} of {len(clients)} clients, and in {100 * share:.2g} % of the rounds none of "
        f"rank {largest}: {federation.rule} then {what}",
        stacklevel=3,
    )

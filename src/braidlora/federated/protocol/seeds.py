"""Seeds, and the draws that server and clients must agree on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np


def derive_seed(*parts: str | int) -> int:
    """A seed below 2³², a function of `parts` alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")


def sampled(clients: Iterable[str], number: int, seed: int, round: int) -> list[str]:
    """The `number` clients that a federation of this seed samples in a round, in sorted order."""
    names = sorted(clients)
    if number == len(names):
        return names
    random = np.random.default_rng(derive_seed(seed, "sample", round))
    chosen = random.choice(len(names), size=number, replace=False)
    return [names[index] for index in sorted(chosen)]

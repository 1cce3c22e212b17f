"""The initial factors of clients: all from one draw, or each from its own."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from braidlora.config import FederatedConfig
from braidlora.federated.protocol.checks import rank_axis
from braidlora.federated.protocol.factors import ZERO_AT_START, AdaptedLayer, factor_shapes, split
from braidlora.federated.protocol.rules.rule import Rule
from braidlora.federated.protocol.seeds import derive_seed


def start_factors(
    config: FederatedConfig,
    rule: Rule,
    layers: Iterable[AdaptedLayer],
    rank: int,
    own_seed: int | None = None,
) -> dict[str, Tensor]:
    """A client's adapter before its first round, float32: Kaiming-uniform(a = √5), zero for B, B2 and B_base.

    With the same seed, a factor of a lower rank is a slice of that of a higher rank: all A_i are the first r_i rows of
    one A0, all M_i multiples of the first r_i columns of one M0.

    Args:
        own_seed: the client's, for `independent`; None: only the factors that all clients have in common, which with
            `independent` are those that start at zero.
    """
    shared = config.federation.client_init == "shared"
    seed = derive_seed(config.seed if shared or own_seed is None else own_seed, "start")
    factors = {}
    for name, shape in factor_shapes(layers, rule.spec.factors, rank, rule.r_intermediate).items():
        factor = split(name)[1]
        if factor in ZERO_AT_START:
            factors[name] = torch.zeros(shape)
        elif shared or own_seed is not None:
            # The rank comes first, so that a longer draw starts with a shorter one.
            across = rank_axis(factor) == 1
            uniform = np.random.default_rng(derive_seed(seed, name)).random(shape[::-1] if across else shape)
            bound = 1.0 / math.sqrt(shape[1])  # of Kaiming-uniform with a = √5
            values = torch.from_numpy((2.0 * uniform - 1.0) * bound).float()
            factors[name] = values.T.contiguous() if across else values
    return factors

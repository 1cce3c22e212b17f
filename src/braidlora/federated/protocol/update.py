"""What a client sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """One client's reply in one round.

    Nothing is checked here, so that a false reply can be looked at and named: `Guard.check` judges it as a whole, and
    `Rule.add` refuses what it cannot aggregate.

    Args:
        client: stable name of the client.
        num_examples: training rows n_i; by default the client's weight in the round is n_i / Σ n over those that took
            part.
        tensors: what the rule lets travel, by PEFT's state-dict names (`….lora_B.weight`).
        rank: the client's rank r_i; 0 leaves it to the tensors.
        scaling: s_i, by which the client multiplies its update (alpha / r).
        round: number of the round that the reply belongs to.
        steps: optimizer steps that the client took in the round; 0 if it is not reported.
    """

    client: str
    num_examples: int
    tensors: Mapping[str, Tensor]
    rank: int = 0
    scaling: float = 1.0
    round: int = 0
    steps: int = 0

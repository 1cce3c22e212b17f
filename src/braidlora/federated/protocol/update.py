"""What a client sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """One client's update in one round.

    Nothing is checked here, so that an invalid update can be inspected and named: `Guard.check` judges all of it, and
    `Rule.add` rejects what it cannot aggregate.

    Args:
        client: stable name of the client.
        num_examples: training rows n_i; by default the client's weight in the round is n_i / Σ n.
        tensors: what the rule uploads, by PEFT's state-dict names (`….lora_B.weight`).
        rank: the client's rank r_i; 0: that of the tensors.
        scaling: s_i, by which the client multiplies its update (alpha / r).
        round: number of the round it belongs to.
        steps: optimizer steps that the client took in the round; 0 if not reported.
    """

    client: str
    num_examples: int
    tensors: Mapping[str, Tensor]
    rank: int = 0
    scaling: float = 1.0
    round: int = 0
    steps: int = 0

"""Gates that do not read the token: a weight vector and a map per task (MTL-LoRA, arXiv 2410.09437), or equal weights.

    y = W0 x + s·Σᵢ w_tᵢ Bᵢ Λ_t A x          w_t = softmax(v_t / τ)

Suffixes: N experts, T tasks, R rank, G rows of the stacked A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from braidlora.adapters.functional import gate_weights

if TYPE_CHECKING:
    from braidlora.adapters._config import MultiLoraConfig


class TaskGate(NamedTuple):
    """What of a configuration decides what weighs the experts.

    Attributes:
        gate: "token", "task" or "uniform".
        names: the tasks, in the order of their numbers.
        has_router: whether there is a router, which reads x or the task.
        by_task: whether the layer must know the tasks of its rows.
        aligned: whether A x is collected in training.
    """

    gate: str
    names: tuple[str, ...]
    has_router: bool
    by_task: bool
    aligned: bool

    @classmethod
    def of(cls, config: MultiLoraConfig) -> TaskGate:
        """That of a configuration."""
        has_router = config.num_experts > 1 and config.gate != "uniform"
        return cls(
            config.gate,
            tuple(config.task_names or ()),
            has_router,
            config.by_task,
            config.alignment_loss > 0.0,
        )

    @property
    def plain_only(self) -> bool:
        """Whether the layer is computed in plain operations."""
        return self.gate != "token" or self.by_task

    def in_words(self) -> str:
        """For a representation, behind other settings."""
        return "" if self.gate == "token" else f", gate={self.gate}"


def uniform_weights(num_experts: int, like: Tensor) -> Tensor:
    """1 / N for all experts, (N,), in float32 or better."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((num_experts,), 1.0 / num_experts, dtype=dtype, device=like.device)


def task_weights(router_NT: Tensor, temperature: float) -> Tensor:
    """softmax(v_t / τ) of every task, (T, N), in float32 or better."""
    return gate_weights(router_NT.mT, temperature)


def mapped(h_G: Tensor, map_TRR: Tensor, tasks: Tensor | int) -> Tensor:
    """Λ_t h of every block of r components of h (…, G), in the dtype of h.

    Args:
        map_TRR: all Λ_t, stacked (T·r, r).
        tasks: the number of each token's task, that broadcasts to the leading axes of h.
    """
    r = map_TRR.shape[1]
    maps = map_TRR.to(h_G.dtype).unflatten(0, (-1, r))[tasks]
    blocks = h_G.unflatten(-1, (-1, r))
    if maps.dim() == 2:  # one task
        return (blocks @ maps.mT).flatten(-2)
    if maps.numel() == len(maps) * r * r:  # one for each row
        rows = blocks.reshape(len(maps), -1, r) @ maps.reshape(-1, r, r).mT
        return rows.reshape(h_G.shape)
    return (maps.unsqueeze(-3) @ blocks.unsqueeze(-1)).squeeze(-1).flatten(-2)


def with_map(A_GK: Tensor, map_TRR: Tensor, task: int) -> Tensor:
    """Λ_t Aᵢ of every block of r rows, (G, k)."""
    r = map_TRR.shape[1]
    one = map_TRR.to(A_GK.dtype)[task * r : (task + 1) * r]
    return (one @ A_GK.unflatten(0, (-1, r))).flatten(0, 1)

"""The gate between a server's shrink and expand matrices: what a column is multiplied by, for every token of a batch.

Each slot that holds an adapter has a row in two tables, and one more row is for the base model. A batch selects a row
per token; then the gate is a softmax, a gather and a product, whatever mixture of adapters the batch holds. There is
no control flow that depends on data and nothing is changed in place, so it can be captured in a CUDA graph.

Suffixes name the axes: S slices of a packed layer, T tokens, R rank of the server, M columns that may hold router
logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from braidlora.serving.adapter_file import Layout


class GateTables:
    """Which router weight multiplies each column, by slot, and by token of the current batch.

    A column's factor is looked up in (w_1 … w_M, 0, 1), where w is the softmax of the last M columns of the buffer
    after columns that hold no logit of this adapter were masked. An unused column has factor 0, all columns of a plain
    LoRA have factor 1, and those of the base model 0.

    Args:
        slots: adapters that can be active at once.
        rank: R.
        tokens: the most tokens in a batch.
        device: of the batch.
    """

    def __init__(self, slots: int, rank: int, tokens: int, device: torch.device | str) -> None:
        self.base, self.rank = slots, rank
        self.logits = max(1, rank // 2)  # M: N experts need N·(r + 1) ≥ 2N columns
        self._zero, self._one = self.logits, self.logits + 1
        self.slot_column = torch.full((slots + 1, rank), self._one, dtype=torch.long, device=device)
        self.slot_mask = torch.zeros(slots + 1, self.logits, device=device)
        self.slot_column[self.base] = self._zero
        self.constants = torch.tensor([0.0, 1.0], device=device)
        self.column_TR = torch.full((tokens, rank), self._one, dtype=torch.long, device=device)
        self.mask_TM = torch.zeros(tokens, self.logits, device=device)
        self.routed: set[int] = set()  # slots

    def set_slot(self, slot: int, layout: Layout | None) -> None:
        """Describe the adapter that a slot now holds; None, or a single expert, is a plain LoRA."""
        column = torch.full((self.rank,), self._one, dtype=torch.long)
        mask = torch.zeros(self.logits)
        if layout is not None and layout.num_experts > 1:
            n, r = layout.num_experts, layout.r
            assert layout.columns <= self.rank
            column[:] = self._zero
            column[: n * r] = self.logits - n + torch.arange(n).repeat_interleave(r)
            mask[: self.logits - n] = -torch.inf
            self.routed.add(slot)
        else:
            self.routed.discard(slot)
        self.slot_column[slot].copy_(column)
        self.slot_mask[slot].copy_(mask)

    def set_batch(self, slot_T: Tensor) -> None:
        """Select the rows of the tokens' slots, -1 being the base model, into tensors that stay where they are."""
        rows = torch.where(slot_T < 0, self.base, slot_T)
        count = rows.shape[0]
        torch.index_select(self.slot_column, 0, rows, out=self.column_TR[:count])
        torch.index_select(self.slot_mask, 0, rows, out=self.mask_TM[:count])

    def apply(self, buffer_STR: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The buffer (S, T, R) with every column multiplied by its factor; the result is a new tensor.

        Args:
            buffer_STR: x · shrinkᵀ in float32, for each slice of the layer.
            reduce: sums over workers, where each has only a part of x and so of the logits.
        """
        count = buffer_STR.shape[-2]
        logits_STM = buffer_STR[..., self.rank - self.logits :]
        if reduce is not None:
            logits_STM = reduce(logits_STM.contiguous())
        w_STM = torch.softmax(logits_STM + self.mask_TM[:count], -1)
        constants = self.constants.expand(*w_STM.shape[:-1], 2)
        choices = torch.cat([w_STM, constants], -1)
        return buffer_STR * choices.gather(-1, self.column_TR[:count].expand_as(buffer_STR))

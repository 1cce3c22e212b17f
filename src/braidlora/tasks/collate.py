"""From rows to batches: right padding for training, left padding for generation, and packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.tasks.encode import IGNORED
from braidlora.tasks.packing import pack


@dataclass(eq=False)
class Collator:
    """Rows of a `MultiTaskDataset` → one batch.

    Unpacked (B rows, L tokens): `input_ids`, `attention_mask`, `labels` (B, L) int64, padded on the right, and
    `task_id` (B,) int64; for `classify`, `labels` is (B,), one class per row.

    Packed (the same B rows in S sequences of at most `cutoff` tokens): `input_ids`, `labels`,
    `position_ids`, `task_id` (S, L), where `task_id` is the task of each token and -1 at padding, and
    `attention_mask` (S, 1, L, L) bool, true where a token may attend.

    With `loss_positions` there is an entry of that name, (B, K) or (S, K) int64: each row's positions whose next token
    carries loss, the only ones whose logits are needed. Rows with fewer than K of them repeat the last position, L - 1,
    which has no next token.

    The model takes neither `task_id` nor `loss_positions`: pop them before `model(**batch)`.

    Args:
        pad_id: the padding token (its value does not matter: it is masked and carries no loss).
        kind: `generate` or `classify`.
        packing: put several rows of the batch into one sequence.
        cutoff: longest packed sequence.
        pad_to_multiple_of: round L up, e.g. to 8 for tensor cores.
        loss_positions: add the entry `loss_positions`; only for `generate`.
    """

    pad_id: int
    kind: str = "generate"
    _: KW_ONLY
    packing: bool = False
    cutoff: int = 256
    pad_to_multiple_of: int = 1
    loss_positions: bool = False

    def __post_init__(self) -> None:
        if self.packing and self.kind == "classify":
            raise ConfigError(
                "prompt.packing: `classify` tasks have one label per sequence and cannot be packed."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._batch(rows)
        if self.loss_positions and self.kind == "generate":
            batch["loss_positions"] = loss_positions(batch["labels"])
        return batch

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.packing:
            return pack(rows, self.pad_id, self.cutoff, self.pad_to_multiple_of)
        multiple = self.pad_to_multiple_of
        input_ids, attention_mask = pad([row["input_ids"] for row in rows], self.pad_id, multiple=multiple)
        if self.kind == "classify":
            labels = torch.tensor([row["labels"] for row in rows], dtype=torch.int64)
        else:
            labels, _ = pad([row["labels"] for row in rows], IGNORED, multiple=multiple)
        task_id = torch.tensor([row["task_id"] for row in rows], dtype=torch.int64)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "task_id": task_id,
        }


def loss_positions(labels_BL: Tensor) -> Tensor:
    """Each row's positions whose next token carries loss, in order, (B, K); rows with fewer are filled with L - 1."""
    carries = labels_BL[:, 1:].ne(IGNORED)
    counts_B1 = carries.sum(1, keepdim=True)
    most = int(counts_B1.max())
    first = carries.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(torch.arange(most) < counts_B1, first, labels_BL.shape[1] - 1)


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows as one batch, and its attention mask, both (B, L) int64.

    Args:
        rows: token ids or labels of each row.
        pad_id: what fills the rest of a row.
        left: pad on the left, for generation, instead of on the right.
        multiple: round L up to a multiple of this.
    """
    longest = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        padded[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return padded, mask

"""Packing: several rows in one sequence that do not attend to each other.

The rows of one batch are packed into as few sequences as fit, and these are made as short as possible, so a step trains
on the same rows as without packing and has the same loss, with less padding. Positions restart at every row, and a
block-diagonal causal mask of shape (S, 1, L, L) confines attention to the row:

    tokens     a a a b b |        a . . . .
    positions  0 1 2 0 1 |        a a . . .
    task_id    3 3 3 1 1 |  mask  a a a . .
                         |        . . . b .
                         |        . . . b b

transformers passes a 4-D mask on to the attention unchanged. Not every model and attention implementation supports one
(flash attention does not, and eager attention would add it as numbers), so `check_packing` tests the model first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.tasks.encode import IGNORED


def pack(
    rows: Sequence[Mapping[str, Any]], pad_id: int, cutoff: int, pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """Pack `rows` (items of a `MultiTaskDataset`) into sequences of at most `cutoff` tokens.

    Returns:
        `input_ids`, `labels`, `position_ids`, `task_id` (S, L) int64 and `attention_mask` (S, 1, L, L) bool.
    """
    bins = _fill([len(row["input_ids"]) for row in rows], cutoff)
    longest = max(sum(len(rows[index]["input_ids"]) for index in one) for one in bins)
    longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(bins), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    task_id = torch.full(shape, -1, dtype=torch.int64)
    segment = torch.full(shape, -1, dtype=torch.int64)
    for sequence, one in enumerate(bins):
        start = 0
        for index in one:
            row = rows[index]
            end = start + len(row["input_ids"])
            input_ids[sequence, start:end] = torch.tensor(row["input_ids"])
            labels[sequence, start:end] = torch.tensor(row["labels"])
            labels[sequence, start] = IGNORED  # the previous row must not predict it
            position_ids[sequence, start:end] = torch.arange(end - start)
            task_id[sequence, start:end] = row["task_id"]
            segment[sequence, start:end] = index
            start = end
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    # Padding is its own segment and attends to itself: a mask row without a true entry gives NaN.
    attention_mask = (segment[:, :, None] == segment[:, None, :]) & causal
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask[:, None],
        "position_ids": position_ids,
        "labels": labels,
        "task_id": task_id,
    }


def _fill(lengths: Sequence[int], cutoff: int) -> list[list[int]]:
    """Rows of each sequence: no more sequences than first fit needs at `cutoff`, and the longest as short as it finds.

    Every sequence is padded to the longest. At a cutoff of 256, 16 rows of 17 tokens would become 2 x 255 positions;
    here they become 2 x 136.
    """
    best = _first_fit(lengths, cutoff)
    low, high = max(max(lengths), -(-sum(lengths) // len(best))), cutoff
    while low < high:
        middle = (low + high) // 2
        bins = _first_fit(lengths, middle)
        if len(bins) <= len(best):
            best, high = bins, middle
        else:
            low = middle + 1
    return best


def _first_fit(lengths: Sequence[int], cutoff: int) -> list[list[int]]:
    """First fit, longest first. A row longer than `cutoff` has a sequence of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        at = next((at for at, free in enumerate(room) if free >= lengths[index]), None)
        if at is None:
            bins.append([index])
            room.append(cutoff - lengths[index])
        else:
            bins[at].append(index)
            room[at] -= lengths[index]
    return bins


def check_packing(model: Any, cutoff: int) -> None:
    """Reject packing if packed rows influence each other in this model, or see more of themselves than they should.

    transformers uses a given 4-D mask in every layer as it is, also in layers of sliding-window or chunked attention:
    a row longer than the window would see all of itself in training, but not when it is scored or served.

    Packs two short rows and runs them twice, with different tokens in the first row: the logits of the second row must
    not change (a masked key has weight exactly 0), and must equal those of the row alone up to rounding.

    Args:
        model: a causal LM, with or without an adapter; its training mode is restored.
        cutoff: the most tokens that a row can have.

    Raises:
        ConfigError: the model does not support a 4-D mask, or one row changes the logits of another, or rows can be
            longer than the model's attention window.
    """
    text = model.config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(text, name, None)
        if window is not None and window < cutoff:
            raise ConfigError(
                f"prompt.packing: {type(model).__name__} has layers that attend to {window} tokens only ({name}), "
                f"which packing would ignore in longer rows, and prompt.cutoff is {cutoff}. Set prompt.cutoff={window} "
                "or less, or prompt.packing=false."
            )
    embedding = model.get_input_embeddings().weight
    first = [(7 * at + 3) % embedding.shape[0] for at in range(5)]
    other = [(13 * at + 8) % embedding.shape[0] for at in range(5)]
    second = [(11 * at + 5) % embedding.shape[0] for at in range(4)]

    def packed_logits(before: list[int]) -> Tensor:
        rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids), "task_id": 0} for ids in (before, second)]
        batch = {name: value.to(embedding.device) for name, value in pack(rows, 0, 9).items()}
        del batch["task_id"], batch["labels"]
        return model(**batch).logits[0, len(before) :].float()

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([second], device=embedding.device)).logits[0].float()
            packed = packed_logits(first)
            leak = float((packed - packed_logits(other)).abs().max())
            error = float((packed - alone).abs().max())
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as problem:
        raise ConfigError(_refusal(model, f"the packed forward failed: {problem}")) from problem
    finally:
        model.train(training)
    scale = float(alone.abs().max())
    if not leak <= 1e-6 * scale:
        raise ConfigError(_refusal(model, f"the logits of a row change by {leak:.2g} with the row before it"))
    if not error <= 0.05 * scale:  # allows for the rounding of 16-bit and quantized weights
        raise ConfigError(_refusal(model, f"packed and unpacked logits differ by {error:.2g}"))


def _refusal(model: Any, reason: str) -> str:
    attention = getattr(model.config, "_attn_implementation", "unknown")
    return (
        f"prompt.packing: {type(model).__name__} with {attention} attention does not keep packed rows separate "
        f"({reason}). Set prompt.packing=false, or model.attention=sdpa."
    )

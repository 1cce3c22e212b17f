"""Answers from a model, in batches: free text, the likeliest of given options, or a class.

Every function takes token ids and yields `(row index, answer)` pairs batch by batch, longest rows first, so that
running out of memory shows at once. A row's answer does not depend on the other rows of its batch.
Shapes: b rows in a batch, o options, n prompt tokens, t answer tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from braidlora.errors import ConfigError, TrainingError, explain_out_of_memory
from braidlora.tasks import pad

Ids = Sequence[int]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 32,
    sampling: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
    streamer: Any = None,
) -> Iterator[tuple[int, str]]:
    """Greedy or beam-search continuations of `prompts`, decoded without the prompt and up to the first end token.

    The base's own generation settings (sampling, repetition penalty, …) are ignored, so that scores depend on the
    recipe alone; only its end tokens are used, together with the tokenizer's.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        tokenizer: its tokenizer; needs an end token and a padding token.
        prompts: token ids of each row, without padding.
        max_new_tokens: longest answer in tokens.
        num_beams: 1 is greedy.
        batch_size: rows per call of `model.generate`; each holds `num_beams` sequences.
        sampling: settings of transformers' GenerationConfig that replace greedy search, e.g. `do_sample`.
        stop: texts that end a continuation and are cut off.
        streamer: of transformers, for one prompt at a time.

    Yields:
        (index into `prompts`, stripped text), in batches, not in order.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        stop_strings=list(stop) or None,
        **(sampling or {"do_sample": False}),
    )
    extra = {"tokenizer": tokenizer} if stop else {}
    # PEFT puts virtual tokens before the padding and counts positions through it.
    unpadded = _has_virtual_tokens(model)
    with _evaluating(model), _own_generation_config(model, config):
        for indices in _batches(prompts, batch_size, unpadded=unpadded):
            batch = [prompts[i] for i in indices]
            ids_bn, mask_bn = _padded(batch, tokenizer.pad_token_id, model.device, left=True)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids_bn,
                    attention_mask=mask_bn,
                    generation_config=config,
                    streamer=streamer,
                    **extra,
                )
            for index, new in zip(indices, out[:, ids_bn.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(new) if token in ends), len(new))
                text = tokenizer.decode(new[:end], skip_special_tokens=True)
                yield index, _before(text, stop).strip()


def rank(
    model: Any,
    prompts: Sequence[Ids],
    options: Sequence[Ids],
    *,
    pad_token_id: int,
    length_normalized: bool = True,
    batch_size: int = 32,
) -> Iterator[tuple[int, list[float]]]:
    """Log-likelihood of every option after every prompt, in float64.

    A prompt is read once and its keys and values are shared by all options. Options are scored with all their tokens,
    including the end token if present; without it "yes" would be favored over "yes, both", which begins with it.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        prompts: token ids of each row, without padding.
        options: token ids of each option, as they would follow the prompt in training; not empty.
        pad_token_id: any valid token; it is masked.
        length_normalized: mean over an option's tokens instead of their sum.
        batch_size: (prompt, option) pairs scored at once.

    Yields:
        (index into `prompts`, one value per option), in batches, not in order.

    Raises:
        ConfigError: the adapter learns prompts (its virtual tokens are in the cache that is shared here).
        TrainingError: the model gives NaN.
        ValueError: an option is empty.
    """
    if not options or not all(options):
        raise ValueError("options: got an empty option, or none at all")
    if _has_virtual_tokens(model):
        raise ConfigError(
            "evaluation.mode: `rank` does not work with prompt-learning adapters; use `generate`."
        )
    with _evaluating(model):
        for indices in _batches(prompts, max(1, batch_size // len(options))):
            with torch.inference_mode():
                values_bo = _rank_batch(
                    model, [prompts[i] for i in indices], options, pad_token_id, length_normalized, batch_size
                )
            if values_bo.isnan().any():
                raise TrainingError("the model's log-likelihoods are NaN; check its weights and dtype.")
            yield from zip(indices, values_bo.tolist(), strict=True)


def classify(
    model: Any, texts: Sequence[Ids], allowed: Tensor, *, pad_token_id: int, batch_size: int = 32
) -> Iterator[tuple[int, int]]:
    """The likeliest of the task's own classes for each text: (index into `texts`, label id), see `class_logits`."""
    for indices, logits_bL in class_logits(
        model, texts, allowed, pad_token_id=pad_token_id, batch_size=batch_size
    ):
        yield from zip(indices, logits_bL.argmax(-1).tolist(), strict=True)


def class_logits(
    model: Any, texts: Sequence[Ids], allowed: Tensor, *, pad_token_id: int, batch_size: int = 32
) -> Iterator[tuple[list[int], Tensor]]:
    """The logits of the task's own classes for each text.

    Args:
        model: a sequence classifier over the union of all tasks' labels, with or without a PEFT adapter.
        texts: token ids of each row, with special tokens, without padding.
        allowed: (num_labels,) bool, the labels that this task may use.
        pad_token_id: of the tokenizer; padding is on the right, as in training.
        batch_size: rows at once.

    Yields:
        indices into `texts`, and their logits (b, L) over all L labels, -inf where not allowed. Not in order.

    Raises:
        TrainingError: the model gives NaN.
    """
    with _evaluating(model):
        for indices in _batches(texts, batch_size):
            ids_bn, mask_bn = _padded([texts[i] for i in indices], pad_token_id, model.device, left=False)
            with torch.inference_mode():
                logits = model(input_ids=ids_bn, attention_mask=mask_bn).logits
            if logits.isnan().any():
                raise TrainingError("the model's logits are NaN; check its weights and dtype.")
            yield indices, logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def _before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of `stop`."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _padded(rows: Sequence[Ids], pad_token_id: int, device: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (b, n) int64, on the device."""
    ids, mask = pad(rows, pad_token_id, left=left)
    return ids.to(device), mask.to(device)


def _rank_batch(
    model: Any,
    prompts: Sequence[Ids],
    options: Sequence[Ids],
    pad_token_id: int,
    length_normalized: bool,
    batch_size: int,
) -> Tensor:
    """(b, o) float64."""
    ids_bn, mask_bn = _padded(prompts, pad_token_id, model.device, left=True)
    positions_bn = (mask_bn.cumsum(1) - 1).clamp(min=0)
    # Prompts are padded on the left, so the logits of the last column predict each option's first token. With a large
    # vocabulary all logits of the prompts, (b, n, V), may need more memory than anything else.
    optional = inspect.signature(transformers_model(model).forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in optional else {}
    read = model(input_ids=ids_bn, attention_mask=mask_bn, position_ids=positions_bn, use_cache=True, **keep)
    first_bV = F.log_softmax(read.logits[:, -1].float(), -1)
    groups = [options[at : at + batch_size] for at in range(0, len(options), batch_size)]
    values = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        cache = read.past_key_values if last else copy.deepcopy(read.past_key_values)
        values.append(_rank_group(model, mask_bn, first_bV, cache, group, pad_token_id))
    sums_bo = torch.cat(values, 1)
    if length_normalized:
        return sums_bo / torch.tensor([len(option) for option in options], device=sums_bo.device)
    return sums_bo


def _rank_group(
    model: Any, mask_bn: Tensor, first_bV: Tensor, cache: Any, options: Sequence[Ids], pad_token_id: int
) -> Tensor:
    """Sum of the log-likelihoods of each option's tokens: (b, o) float64. The cache is consumed."""
    b, o = mask_bn.shape[0], len(options)
    ids_ot, valid_ot = _padded(options, pad_token_id, mask_bn.device, left=False)
    sums_bo = first_bV[:, ids_ot[:, 0]].double()
    if ids_ot.shape[1] == 1:
        return sums_bo
    # The options of one prompt are adjacent: row b·o + j is option j of prompt b.
    cache.batch_repeat_interleave(o)
    before, after = ids_ot[:, :-1].repeat(b, 1), ids_ot[:, 1:].repeat(b, 1)
    mask = torch.cat([mask_bn.repeat_interleave(o, 0), valid_ot[:, :-1].repeat(b, 1)], 1)
    lengths = mask_bn.sum(1).repeat_interleave(o)
    positions = lengths[:, None] + torch.arange(before.shape[1], device=before.device)
    logits = model(
        input_ids=before, attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits
    gathered = F.log_softmax(logits.float(), -1).gather(-1, after[..., None])[..., 0]
    valid = valid_ot[:, 1:].repeat(b, 1).bool()
    return sums_bo + gathered.double().masked_fill(~valid, 0.0).sum(1).view(b, o)


def _batches(rows: Sequence[Ids], batch_size: int, *, unpadded: bool = False) -> Iterator[list[int]]:
    """Row indices, longest rows first; with `unpadded` a batch holds rows of one length only."""
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    while order:
        batch = order[:batch_size]
        if unpadded:
            batch = [index for index in batch if len(rows[index]) == len(rows[batch[0]])]
        order = order[len(batch) :]
        yield batch


def _has_virtual_tokens(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the base's generation settings.

    Raises:
        ConfigError: there is none.
    """
    own = getattr(transformers_model(model).generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise ConfigError(
            "model.path: neither the tokenizer nor the model defines an end token, so answers would never end. Set "
            "tokenizer.eos_token and save it with the base."
        )
    return sorted(ends)


def transformers_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    # generate() fills unset fields of a passed config from the model's own, e.g. Qwen2's repetition penalty.
    inner = transformers_model(model)
    before = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = before


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and every module's mode restored afterwards; running out of memory becomes a TrainingError."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    remedy = "Lower evaluation.batch_size (or num_beams) and start again: answers are kept."
    try:
        with explain_out_of_memory("out of memory while evaluating", remedy):
            yield
    finally:
        for module in trained:
            module.training = True

"""Expert weights that do not depend on the token: given, or measured on one task's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from braidlora.adapters.router_means import RouterMean, router_means
from braidlora.config import PromptSection
from braidlora.errors import ConfigError, DataError
from braidlora.export.source import Source
from braidlora.tasks import Collator, Task, encode_tasks

FORMS = "task=NAME, uniform, or one number per expert such as 0.5,0.3,0.2"
_TASK = "task="
_SUM_TOLERANCE = 1e-3
_BATCH = 8


@dataclass(frozen=True)
class StaticWeights:
    """Expert weights in place of the router's.

    Attributes:
        weights: (N,) for all modules, or by module.
        task, rows, tokens: what they were measured on, if they were.
    """

    weights: Tensor | dict[str, Tensor]
    task: str = ""
    rows: int = 0
    tokens: int = 0

    def in_words(self) -> str:
        if isinstance(self.weights, Tensor):
            return f"at {', '.join(f'{value:.4g}' for value in self.weights.tolist())} in every layer"
        return f"at each router's mean over the {self.tokens} tokens of {self.rows} training rows of task {self.task}"

    def to_json(self) -> dict[str, Any]:
        if isinstance(self.weights, Tensor):
            return {"weights": self.weights.tolist()}
        layers = {name: w_N.tolist() for name, w_N in self.weights.items()}
        return {"task": self.task, "rows": self.rows, "tokens": self.tokens, "layers": layers}


@dataclass(frozen=True)
class OfTask:
    """The weights that an adapter itself has for a task."""

    name: str


def wanted_weights(source: Source, text: str | None) -> str | Tensor | OfTask | None:
    """The value of `--static-weights`: the name of a task to measure on, N weights, or None if none are needed.

    An adapter that weighs its experts by task has weights for each, which need no measuring.

    Raises:
        ConfigError: it is needed but not given, or given but not needed; the text has none of the forms; the numbers
            are not weights of N experts.
    """
    experts, what = source.experts, source.describe()
    if source.tasks:
        return _of_task(source, text)
    if not source.routed:
        if text is not None:
            raise ConfigError(
                f"--static-weights: {source.folder} is {what} and has no router; leave out the option, the export is "
                "exact."
            )
        return None
    if text is None:
        raise ConfigError(
            f"{source.folder}: {what}, mixed by a router for every token, so no single LoRA equals it. Either keep it "
            "(`import braidlora; PeftModel.from_pretrained` loads it), or fix the expert weights with "
            f"--static-weights {FORMS}: an approximation whose cost is measured on the test rows."
        )
    if text.startswith(_TASK):
        return text.removeprefix(_TASK)
    if text == "uniform":
        return torch.full((experts,), 1.0 / experts, dtype=torch.float64)
    return _numbers(text, experts)


def _of_task(source: Source, text: str | None) -> OfTask:
    name = (text or "").removeprefix(_TASK)
    if text is None or not text.startswith(_TASK) or name not in source.tasks:
        got = "" if text is None else f" got {text!r};"
        raise ConfigError(
            f"--static-weights:{got} {source.folder} is a different LoRA for each of its tasks. Export them one "
            f"by one, exactly, with --static-weights=task=NAME, where NAME is one of {', '.join(source.tasks)}."
        )
    return OfTask(name)


def _numbers(text: str, experts: int) -> Tensor:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(f"--static-weights: got {text!r}; expected {FORMS}.") from None
    if len(values) != experts:
        raise ConfigError(f"--static-weights: got {len(values)} numbers; the adapter has {experts} experts.")
    if not all(math.isfinite(value) and value >= 0.0 for value in values):
        raise ConfigError(f"--static-weights: got {text}; expected finite numbers of at least 0.")
    total = math.fsum(values)
    if abs(total - 1.0) > _SUM_TOLERANCE:
        fix = f" Write {','.join(f'{value / total:.4f}' for value in values)}." if total > 0 else ""
        raise ConfigError(f"--static-weights: {text} sum to {total:g}; a router's weights sum to 1.{fix}")
    return torch.tensor(values, dtype=torch.float64)


def measure(model: Any, tokenizer: Any, task: Task, prompt: PromptSection, rows: int) -> StaticWeights:
    """Each router's mean weights over up to `rows` training rows of a task, evenly spaced.

    Raises:
        ConfigError: a layer sees neither every token nor one token of each row.
        DataError: the task has no training rows; test rows are not used, because they score the result.
    """
    if not task.train:
        raise DataError(
            f"task {task.name}: has no training rows to measure the routers on. Give it `train`, or use "
            "--static-weights=uniform."
        )
    encoded = encode_tasks([task], tokenizer, prompt)
    count = min(rows, len(encoded))
    chosen = sorted(
        (encoded[i * len(encoded) // count] for i in range(count)), key=lambda row: len(row["input_ids"])
    )
    collate = Collator(tokenizer.pad_token_id, task.kind)
    batches = (collate(chosen[at : at + _BATCH]) for at in range(0, count, _BATCH))
    means, tokens = router_means(model, batches)
    _check_called(means, tokens, count)
    return StaticWeights({name: mean.weights for name, mean in means.items()}, task.name, count, tokens)


def _check_called(means: Mapping[str, RouterMean], tokens: int, rows: int) -> None:
    """Reject routers that saw nothing, or an unknown part of the tokens.

    A pooler sees one token of each row, BERT's the first. In use it sees no others, so its mean over them is right.
    """
    for name, mean in means.items():
        plain = mean.weights.dim() == 1
        if plain and mean.tokens not in (0, rows, tokens):
            problem = f"sees {mean.tokens} of {tokens} tokens, so its mean weights are not those of the task"
        elif mean.tokens == 0 if plain else mean.tokens < 0.5 * tokens:
            problem = "is not called when the model reads text, so its router has no mean"
        else:
            continue
        raise ConfigError(f"{name}: {problem}. Use --static-weights=uniform, or give the weights.")

"""Expert weights that do not depend on the token: as asked for, or measured on one task's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.adapters import MultiLoraLayer, MultiLoraParameter
from braidlora.adapters.functional import gate_weights
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
        weights: (N,) for all modules alike, or by module.
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


def wanted_weights(source: Source, text: str | None) -> str | Tensor | None:
    """What `--static-weights` asks for: the name of a task to measure on, N weights, or None where none are needed.

    Raises:
        ConfigError: they are needed and not given, or given and not needed; the text has none of the forms; the
            numbers are not weights of N experts.
    """
    experts, what = source.experts, source.describe()
    if experts == 1:
        if text is not None:
            raise ConfigError(
                f"--static-weights: {source.folder} is {what} and has no router; leave the option out, the export is "
                "exact."
            )
        return None
    if text is None:
        raise ConfigError(
            f"{source.folder}: {what}, mixed by a router for every token, so no single LoRA equals it. Either keep it "
            "as it is (`import braidlora; PeftModel.from_pretrained` loads it), or fix the expert weights with "
            f"--static-weights {FORMS}: an approximation, whose cost is measured on the test rows and shown."
        )
    if text.startswith(_TASK):
        return text.removeprefix(_TASK)
    if text == "uniform":
        return torch.full((experts,), 1.0 / experts, dtype=torch.float64)
    return _numbers(text, experts)


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
        mended = f" Write {','.join(f'{value / total:.4f}' for value in values)}." if total > 0 else ""
        raise ConfigError(
            f"--static-weights: {text} sum up to {total:g}; a router's weights sum up to 1.{mended}"
        )
    return torch.tensor(values, dtype=torch.float64)


def measure(model: Any, tokenizer: Any, task: Task, prompt: PromptSection, rows: int) -> StaticWeights:
    """Each router's mean weights over up to `rows` training rows of a task, evenly spread over its rows.

    Raises:
        ConfigError: a layer's mean cannot be taken this way.
        DataError: the task has no training rows; test rows are not looked at, for they judge the result.
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
    weights, tokens = mean_router_weights(model, batches)
    return StaticWeights(weights, task.name, count, tokens)


@torch.no_grad()
def mean_router_weights(
    model: Any, batches: Iterable[Mapping[str, Tensor]], adapter: str = "default"
) -> tuple[dict[str, Tensor], int]:
    """Mean over all tokens, padding apart, of every router's weights softmax(W_g x / τ).

    Args:
        model: a PEFT model with a multi-LoRA adapter, in evaluation mode.
        batches: `input_ids` and `attention_mask`, both (rows, tokens).

    Returns:
        (N,) float64 by module name, and the number of tokens. For a parameter of E stacked experts (E, N), each over
        the tokens that the expert gets; uniform for an expert that gets none.

    Raises:
        ConfigError: a layer is fed some of the tokens only, or is not called.
    """
    network = model.get_base_model()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, MultiLoraLayer)}
    sums = {name: torch.zeros(layer.gate[adapter].num_experts).double() for name, layer in layers.items()}
    stacks = {
        name: torch.zeros(layer.blocks, layer.gate[adapter].num_experts).double()
        for name, layer in layers.items()
        if isinstance(layer, MultiLoraParameter)
    }
    mask = torch.ones(0, dtype=torch.bool)

    def add(name: str, layer: Any, x: Tensor) -> None:
        router = layer.braidlora_router[adapter].weight
        logits = F.linear(x.to(router.dtype), router)
        weights = gate_weights(logits, layer.gate[adapter].temperature).flatten(0, -2)
        if weights.shape[0] != mask.numel():
            raise ConfigError(
                f"{name}: sees {weights.shape[0]} of the batch's {mask.numel()} tokens, so its mean weights are not "
                "those of the task. Use --static-weights=uniform, or give the weights."
            )
        sums[name] += weights[mask].double().sum(0).cpu()

    def add_rows(name: str, layer: Any, x: Tensor, rows: Any) -> None:
        weights = layer.routing(x, rows, adapter).double().cpu()
        read = mask.cpu()[rows.token_S.cpu()]
        stacks[name].index_add_(0, rows.expert_S.cpu()[read], weights[read])
        sums[name] += weights[read].sum(0)

    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, name=name: (add_rows if name in stacks else add)(name, module, *args)
        )
        for name, layer in layers.items()
    ]
    tokens = 0
    try:
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            mask = inputs["attention_mask"].flatten().bool()
            tokens += int(mask.sum())
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name, total in sums.items() if total.sum() < 0.5 * tokens]
    if unused:
        raise ConfigError(
            f"{unused[0]}: is not called when the model reads text, so its router has no mean. Use "
            "--static-weights=uniform, or give the weights."
        )
    means = {name: total / tokens for name, total in sums.items()}
    for name, sums_EN in stacks.items():
        uniform = torch.full_like(sums_EN, 1 / sums_EN.shape[1])
        counts_E1 = sums_EN.sum(1, keepdim=True)  # weights sum up to 1
        means[name] = torch.where(counts_E1 > 0.5, sums_EN / counts_E1.clamp(min=0.5), uniform)
    return means, tokens

"""Mean weights of a model's routers over the tokens of some batches, padding left out.

Shapes: B rows, L tokens, T tokens without padding, N experts of the adapter, E stacked experts of the base model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.adapters._experts import MultiLoraParameter, Rows
from braidlora.adapters._layer import MultiLoraLayer
from braidlora.adapters.functional import gate_weights

_ADAPTER = "default"


@dataclass(frozen=True)
class RouterMean:
    """One router.

    Attributes:
        weights: (N,) float64, the mean of softmax(W_g x / τ). For a parameter of E stacked experts (E, N), each over
            the tokens routed to that expert; uniform for an expert without tokens.
        token_entropy: mean normalized entropy of the weights of single tokens.
        tokens: how many the router saw.
    """

    weights: Tensor
    token_entropy: float
    tokens: int


@torch.no_grad()
def router_means(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, RouterMean], int]:
    """Run batches through a model and average what its routers give.

    Args:
        model: a PEFT model with a multi-LoRA adapter called `default`, in evaluation mode. One with weights or maps by
            task must be called within `for_tasks`.
        batches: `input_ids` and `attention_mask`, both (B, L).

    Returns:
        the mean of each router by module name, and the number of tokens. A router that saw another number of tokens
        belongs to a layer that is not called, or not with every token: a pooler's saw one token of each row.
    """
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, MultiLoraLayer)
        and _ADAPTER in module.braidlora_router
        and module.task_gate[_ADAPTER].gate == "token"
    }
    sums = {name: _sums(layer) for name, layer in layers.items()}
    mask = torch.ones(0, 0, dtype=torch.bool)

    def watch(name: str, layer: Any, x: Tensor, *rows: Rows) -> None:
        found = sums[name]
        if rows:  # of stacked experts: one row for every pair of token and expert
            weights = layer.routing(x, rows[0], _ADAPTER).double().cpu()
            seen = mask.flatten().cpu()[rows[0].token_S.cpu()]
            found.add(weights[seen], rows[0].expert_S.cpu()[seen])
            return
        tokens = x.flatten(0, -2)
        if len(tokens) == mask.numel():
            tokens = tokens[mask.flatten()]
        router = layer.braidlora_router[_ADAPTER].weight
        found.add(
            gate_weights(F.linear(tokens.to(router.dtype), router), layer.gate[_ADAPTER].temperature)
            .double()
            .cpu()
        )

    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: watch(name, module, *inputs))
        for name, layer in layers.items()
    ]
    tokens = 0
    try:
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            mask = inputs["attention_mask"].bool()
            tokens += int(mask.sum())
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.mean() for name, found in sums.items()}, tokens


def entropy(weights: Tensor) -> Tensor:
    """Entropy over the last dimension divided by ln N: 1 if all experts are alike, 0 if one has all the weight."""
    return -torch.special.xlogy(weights, weights).sum(-1) / math.log(weights.shape[-1])


class _Sums:
    """Of a router's weights, by stacked expert if there are any, and of the entropies of single tokens."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.entropy, self.tokens = weights, 0.0, 0

    def add(self, weights_TN: Tensor, expert_T: Tensor | None = None) -> None:
        if expert_T is None:
            self.weights += weights_TN.sum(0)
        else:
            self.weights.index_add_(0, expert_T, weights_TN)
        self.entropy += float(entropy(weights_TN).sum())
        self.tokens += len(weights_TN)

    def mean(self) -> RouterMean:
        weights = self.weights / max(1, self.tokens)
        if self.weights.dim() == 2:
            counts_E1 = self.weights.sum(1, keepdim=True)  # weights sum to 1
            uniform = torch.full_like(self.weights, 1 / self.weights.shape[1])
            weights = torch.where(counts_E1 > 0.5, self.weights / counts_E1.clamp(min=0.5), uniform)
        return RouterMean(weights, self.entropy / max(1, self.tokens), self.tokens)


def _sums(layer: MultiLoraLayer) -> _Sums:
    experts = layer.gate[_ADAPTER].num_experts
    shape = (layer.blocks, experts) if isinstance(layer, MultiLoraParameter) else (experts,)
    return _Sums(torch.zeros(shape, dtype=torch.float64))

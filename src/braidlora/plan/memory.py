"""Memory of a training step, from shapes alone: the step runs on the meta device, and live tensors are counted.

    total = weights + adapter + gradients + optimizer + activations

The first four follow from the shapes. `activations` is the peak of everything else during one forward and backward
pass: what autograd saves, and temporary tensors (mainly the logits and their gradient). The same modules run as in
training, on tensors without data.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from braidlora.training.loss import token_losses

ATTENTION = "braidlora_shapes"
_PRODUCTS = {
    F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul,
    Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm,
}  # fmt: skip
_MOMENTS = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes that one step of training needs at its peak, on each device.

    Attributes:
        rows, tokens: of the batch, all rows at full length.
        activations: None if the model cannot run on shapes.
        notes: assumptions.
    """

    rows: int
    tokens: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        parts = (self.weights, self.adapter, self.gradients, self.optimizer)
        return None if self.activations is None else sum(parts) + self.activations

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes), "total": self.total}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations inside the block created.

    Args:
        existing: tensors whose storages do not count.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Autocast(TorchFunctionMode):
    """float32 operands of matrix products as 16-bit copies, frozen weights included: autocast, for the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and "out" not in kwargs:
            args = [self._cast(argument) for argument in args]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def activation_bytes(
    model: Any, kind: str, rows: int, tokens: int, autocast: torch.dtype = torch.float32
) -> int:
    """Peak bytes of one step, without parameters and their gradients.

    Args:
        model: a PEFT model on the meta device; it has gradients afterwards.
        kind: `generate` or `classify`.
        rows, tokens: of the batch.
        autocast: the dtype of matrix products.

    Raises:
        NotImplementedError, RuntimeError: the model needs values, which the meta device does not have.
    """
    model.train()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # counted separately, as they stay from step to step
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    labels = ids if kind == "generate" else ids[:, 0]
    mask = torch.ones_like(ids)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    casting = nullcontext() if autocast == torch.float32 else _Autocast(autocast)
    with LiveBytes([*parameters, *model.buffers(), *gradients, ids, mask]) as live, casting:
        step_loss(model, {"input_ids": ids, "attention_mask": mask}, labels).backward()
    return live.peak


def step_loss(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The loss of a batch as in training, if every token of every row carries loss.

    Args:
        model: a PEFT model.
        inputs: `input_ids` and `attention_mask`, both (rows, tokens).
        labels: (rows, tokens) of a causal language model, (rows,) of a classifier.
    """
    model.config.use_cache = False  # as in the Trainer
    logits = model(**inputs).logits
    if labels.dim() == 2:
        return token_losses(logits[:, :-1], labels[:, 1:]).sum()
    return F.cross_entropy(logits.float(), labels)


def optimizer_bytes(name: str, trained: Iterable[Tensor]) -> tuple[int, list[str]]:
    """Bytes of an optimizer's state, and assumptions: AdamW keeps two moments in the parameters' dtype.

    Args:
        name: of transformers' OptimizerNames.
        trained: the trained parameters.
    """
    plain = name.removeprefix("paged_").split("_")[0]
    moments = _MOMENTS.get(plain, 2)
    known = plain in _MOMENTS or plain.startswith("adam")
    size = sum(
        moments * parameter.numel() * (1 if "8bit" in name else parameter.element_size())
        for parameter in trained
    )
    return size, [] if known else [f"the state of optimizer {name} is counted as AdamW's"]


class _AttentionShapes(torch.autograd.Function):
    """What a fused attention kernel saves: queries, keys, values, result, the log of the sums, and the mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        mask = q.new_empty(q.shape[0], 1, q.shape[2], k.shape[2])
        ctx.save_for_backward(q, k, v, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention_shapes(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (rows, heads, tokens, width) → (rows, tokens, heads, width)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # a padded batch has a mask, and with one transformers repeats keys and values
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if dropout == 0.0:
        result = _AttentionShapes.apply(query, key, value)
    else:  # on a CPU no fused kernel has dropout: torch falls back to the formula, which saves the weights
        mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
        with sdpa_kernel(SDPBackend.MATH):
            result = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_shapes)

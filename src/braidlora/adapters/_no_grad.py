"""Forwards without gradients: an adapter as two matrices, and what a layer keeps of them from token to token.

In evaluation mode with gradients off, a layer needs neither autograd functions nor the adapter's own matrices:

    x (T, K) ─► shrink (P, K) ─► z (T, P) ─► gate ─► u (T, U) ─► expand (U, D) ─► · s + W0 x

Making the two matrices (stacking, casting, transposing) costs as much as several steps of decoding. So a layer keeps
them while it decodes. They are never saved, copied or moved with the layer, and never older than its weights:

- A forward of several positions (a prompt, a batch to score) always reads the weights again, and drops what was kept.
  The step of one position that follows makes the matrices, and later steps use them.
- Each of these steps first compares the weights with those that the matrices were made of: the same modules without
  hooks, the same parameters at the same place in memory, with the same version counter.
- `train`, `eval`, `set_adapter`, `.to`, a forward with gradients and the removal of an adapter drop them.

The first and the last are needed because a version counter does not see every change: neither writes through `.data`,
nor those of fused optimizers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from braidlora.adapters._torch_state import has_hooks, has_products_in, is_capturing, is_observed, stream_of

_COUNTED = (
    "cpu",
    "cuda",
    "mps",
)  # devices whose kernels run in order on one stream, or on one that `stream_of` names


class Factors(NamedTuple):
    """An adapter's matrices as a forward without gradients multiplies by them.

    Attributes:
        shrink_PK: the rows that x is multiplied by.
        expand_UD: in what is kept with the scaling included, and contiguous on a CPU, where the product of one position
            takes half the time in this layout.
    """

    shrink_PK: Tensor  # noqa: N815 (suffixes name the axes)
    expand_UD: Tensor  # noqa: N815

    def scaled(self, scaling: float, x: Tensor) -> Factors:
        """The same with the scaling included, for `add_step` with an input x (B, 1, K): (1, U, D) for B = 1."""
        expand_UD = self.expand_UD * scaling
        if x.is_cpu:
            expand_UD = expand_UD.contiguous()
        return self._replace(expand_UD=expand_UD.unsqueeze(0) if len(x) == 1 else expand_UD)


class Kept:
    """A layer's kept `Factors` by adapter name. A copy of it, by `copy` or `pickle`, is empty."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        if self._entries:
            self._entries.clear()

    def drop(self, name: str) -> None:
        """Forget an adapter's."""
        self._entries.pop(name, None)

    def find(self, name: str, x: Tensor, scaling: float) -> Factors | None:
        """What was kept of an adapter, if it is still what its weights and scaling give for an input like x."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.fits(x, scaling):
            for source in entry.sources:
                if not source.is_unchanged():
                    break
            else:
                return entry.factors
        self.drop(name)
        return None

    def put(self, name: str, factors: Factors, sources: list[Source], x: Tensor, scaling: float) -> None:
        """Keep an adapter's factors, made just now from `sources` for an input like x, where that is safe."""
        if all(source.can_be_watched() for source in sources) and not _others_may_write(x):
            self._entries[name] = _Entry(
                factors, tuple(sources), scaling, x.shape, x.dtype, x.device, stream_of(x)
            )


class Source:
    """A weight that kept factors were made of, as it was then.

    The comparison runs for every weight, layer and token, so it is written for speed.

    Args:
        modules: the dictionary that holds the linear layer by the adapter's name.
        name: that name.
    """

    __slots__ = ("linear", "memory", "modules", "name", "place", "version", "weight")

    def __init__(self, modules: dict[str, Any], name: str) -> None:
        self.modules, self.name = modules, name
        self.linear: nn.Linear = modules[name]
        self.weight: Tensor = self.linear.weight
        # An alias: while it lives, the allocator cannot give the same place to other values.
        self.memory = self.weight.detach()
        self.place = self.weight.data_ptr()
        self.version = -1 if self.weight.is_inference() else self.weight._version

    def can_be_watched(self) -> bool:
        """Whether a change would be noticed; not of the tensors that wrappers put in a parameter's place for a call."""
        return type(self.weight) is nn.Parameter and self.version >= 0

    def is_unchanged(self) -> bool:
        """Whether the layer would read the same values today, from a linear layer that is still a plain one."""
        linear, weight = self.linear, self.weight
        state = linear.__dict__
        return (
            weight._version == self.version
            and weight.data_ptr() == self.place
            and state["_parameters"].get("weight") is weight
            and self.modules.get(self.name) is linear
            and type(linear) is nn.Linear
            and "forward" not in state
            and not has_hooks(state)
        )


class _Entry(NamedTuple):
    factors: Factors
    sources: tuple[Source, ...]
    scaling: float
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stream: int

    def fits(self, x: Tensor, scaling: float) -> bool:
        return (
            scaling == self.scaling
            and x.shape == self.shape
            and x.dtype == self.dtype
            and x.device == self.device
            and (not x.is_cuda or (stream_of(x) == self.stream and not is_capturing(x)))
        )


def _others_may_write(x: Tensor) -> bool:
    """Whether the weights may get new values in a way that no `Source` notices, or the factors are no real tensors.

    FSDP gathers shards into the same parameter at the same place without counting it as a change; a recorded CUDA
    graph reads at every replay what is in the weights by then; a mode may replace every result.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or is_observed() or is_capturing(x) or x.device.type not in _COUNTED


def input_of_step(x: Tensor) -> Tensor:
    """x (B, 1, K) in the dtype that the adapter computes in: its own, or float32 for 16 bits on a CPU.

    Starting a 16-bit product there takes longer than a float32 product of this size.
    """
    return x.float() if x.element_size() < 4 and x.is_cpu else x


def input_of_many(x: Tensor) -> Tensor:
    """x (T, 1, K), in float32 if it has 16 bits and is on a CPU that emulates 16-bit products, which is slower."""
    x_T1K = x.reshape(-1, 1, x.shape[-1])
    return x_T1K.float() if x.element_size() < 4 and x.is_cpu and not has_products_in(x.dtype) else x_T1K


def add_step(y: Tensor, u_B1U: Tensor, scaled: Tensor) -> Tensor:
    """y (B, 1, D) + s·u B in the dtype of y, with the matrix of `Factors.scaled`; y stays as it is."""
    if y.element_size() > u_B1U.element_size():
        return y + (u_B1U @ scaled).to(y.dtype)
    wide = y if y.dtype == u_B1U.dtype else y.to(u_B1U.dtype)
    if scaled.dim() == 3:
        total = torch.baddbmm(wide, u_B1U, scaled)
    else:
        rows, columns = scaled.shape
        total = torch.addmm(wide.reshape(-1, columns), u_B1U.view(-1, rows), scaled).view(y.shape)
    return total if wide is y else total.to(y.dtype)


def add_product(y: Tensor, u_TU: Tensor, B_UD: Tensor, scaling: float, in_place: bool) -> Tensor:
    """y (…, D) + s·u B in the dtype of y, which is overwritten if `in_place`: then it must be contiguous."""
    if y.dtype == u_TU.dtype:
        if in_place:
            y.view(-1, y.shape[-1]).addmm_(u_TU, B_UD, alpha=scaling)
            return y
        return torch.addmm(y.reshape(-1, y.shape[-1]), u_TU, B_UD, alpha=scaling).view(y.shape)
    if y.element_size() > u_TU.element_size():
        return torch.add(y, (u_TU @ B_UD).view(y.shape).to(y.dtype), alpha=scaling)
    wide_TD = y.reshape(-1, y.shape[-1]).to(u_TU.dtype).addmm_(u_TU, B_UD, alpha=scaling)
    return y.copy_(wide_TD.view(y.shape)) if in_place else wide_TD.to(y.dtype).view(y.shape)

"""What the adapters ask of torch by names that torch does not document.

If a name is missing that only a shortcut needs, the answer is the careful one, and the layer computes the same without
the shortcut. Checked against torch 2.10 to 2.13; tests look for all of the names.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext


def is_transformed() -> bool:
    """Whether a function transform is at work: torch.func (grad, vmap, jvp, functionalize, …) or forward-mode AD."""
    return _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_batched(gradient: Tensor | None) -> bool:
    """Whether `torch.autograd.grad(…, is_grads_batched=True)` maps over a backward that is not transformed itself."""
    try:
        return gradient is not None and _functorch.is_legacy_batchedtensor(gradient)
    except AttributeError:
        return True


def is_observed() -> bool:
    """Whether someone sees the results of single operations or modules as they are made.

    That is any mode of `__torch_dispatch__` (selective checkpoints, tracers, counters) or `__torch_function__`, or a
    hook on all modules. A default device is a mode too, but looks at no result.
    """
    try:
        if _dispatch_modes() or nn_module._has_any_global_hook():
            return True
        modes = torch._C._len_torch_function_stack()
        return modes > 0 and any(
            type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes)
        )
    except AttributeError:
        return True


def has_hooks(state: dict[str, Any]) -> bool:
    """Whether a module, given by its `__dict__`, has forward or backward hooks of its own."""
    return bool(
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


@functools.cache
def has_products_in(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this 16-bit type itself, instead of emulating it in float32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return dtype == torch.bfloat16 and known is not None and bool(known())


def is_autocasting() -> bool:
    """Whether autocast may be on, on some device."""
    try:
        return bool(torch._C._is_any_autocast_enabled())
    except AttributeError:
        return True


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is recorded on the current stream."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(x: Tensor) -> int:
    """The current stream of the device of x; 0 where there is one only."""
    if not x.is_cuda:
        return 0
    try:
        return int(torch._C._cuda_getCurrentRawStream(x.get_device()))
    except AttributeError:
        return int(torch.cuda.current_stream(x.device).cuda_stream)


def at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Call at the end of the current backward pass."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _dispatch_modes() -> int:
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes


def references(tensor: Tensor) -> tuple[int, ...]:
    """How many references there are to the tensor and its memory, in Python and in C++, and to a view's base."""
    storage, base = tensor.untyped_storage(), tensor._base
    counts = (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )
    if base is None:
        return counts
    return (*counts, sys.getrefcount(base), base._use_count())  # type: ignore[attr-defined]


def is_alone(tensor: Tensor | None, fresh: frozenset[tuple[int, ...]]) -> bool:
    """Whether nobody but the caller can ever read the tensor's memory: its counts are those of a new result.

    Args:
        tensor: one of the caller's own variables.
        fresh: `fresh_in_forward()` or `fresh_in_backward()`, for the kind of caller.
    """
    return (
        type(tensor) is Tensor
        and tensor.is_contiguous()
        and references(tensor) in fresh
        and not weakref.getweakrefcount(tensor)
    )


# How many references Python itself holds on the way differs between its versions, so they are counted, once. Nobody
# else may hold the results that they are counted on: the product is not looked up in torch.nn.functional, where a
# patch could keep what passes, and no debugger runs (it would copy local variables).


@contextmanager
def _unwatched() -> Iterator[None]:
    # What C code has set (torch's profiler, cProfile) is not callable: it copies nothing, and could not be restored.
    found: list[Any] = [(sys.gettrace(), sys.settrace), (sys.getprofile(), sys.setprofile)]
    python = [(function, put) for function, put in found if callable(function)]
    for _, put in python:
        put(None)
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for function, put in python:
            put(function)


def _zeros(*shape: int, requires_grad: bool = False) -> Tensor:
    # Whatever the defaults are: a default device is a mode that sees every call.
    return torch.zeros(shape, dtype=torch.float32, device="cpu", requires_grad=requires_grad)


def _product(x: Tensor) -> Tensor:
    y: Tensor = torch._C._nn.linear(x, _zeros(2, 3), _zeros(2))
    return y


@functools.cache
def fresh_in_forward() -> frozenset[tuple[int, ...]]:
    """The reference counts of a result that a linear layer has just returned, as such and as a view."""

    def counted(shape: tuple[int, ...]) -> tuple[int, ...]:
        y = _product(_zeros(*shape))
        return _through(y)

    try:
        with _unwatched(), torch.no_grad():
            return frozenset((counted((4, 3)), counted((4, 1, 3))))
    except AttributeError:
        return frozenset()


@functools.cache
def fresh_in_backward() -> frozenset[tuple[int, ...]]:
    """The reference counts of a gradient that a linear layer has just returned, in the backward of a function."""
    try:
        with _unwatched(), torch.enable_grad():
            for shape in ((4, 3), (4, 1, 3)):
                _, x = _Probe.apply(_zeros(*shape, requires_grad=True))
                _product(x).sum().backward()
            return frozenset(_Probe.counts)
    except AttributeError:
        return frozenset()


def _through(tensor: Tensor) -> tuple[int, ...]:
    """`references` with one call between, as in `is_alone`."""
    return references(tensor)


class _Probe(torch.autograd.Function):
    counts: ClassVar[list[tuple[int, ...]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.sum(), x.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dx: Tensor) -> Tensor:
        _Probe.counts.append(_through(dx))
        return dx

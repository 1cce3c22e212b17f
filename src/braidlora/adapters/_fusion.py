"""Where the fused operations of `_fused` apply, and what the layer does around them.

They read weights directly, so no wrapper or hook may own these, and they run in plain eager mode: under compilation,
tracing and function transforms, plain operations can be compiled, saved and transformed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braidlora.adapters._merging import DENSE
from braidlora.adapters._products import linear
from braidlora.adapters._torch_state import has_hooks, is_autocasting, is_observed, is_transformed


def can_fuse(x: Tensor) -> bool:
    """Whether an input may go through the autograd functions: a plain tensor in plain eager mode."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_floating_point()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_transformed()
    )


def is_one_position(x: Tensor) -> bool:
    """Whether x (B, 1, k) is one position of each row of a batch, as in a step of decoding."""
    shape = x.shape
    return len(shape) == 3 and shape[1] == 1


def readable_weight(linear: nn.Module, device: torch.device) -> Tensor | None:
    """`linear.weight`, if it may be read directly: on this device, with no wrapper, parametrization or hook.

    FSDP, offloading and torch.nn.utils.parametrize replace the module, its class or its forward; outside a call the
    weight is a shard or a placeholder.
    """
    state = linear.__dict__
    if type(linear) is not nn.Linear or "forward" in state or has_hooks(state):
        return None
    # FSDP may put a view of its own in the parameter's place.
    weight = linear.weight if "weight" in state else state["_parameters"].get("weight")
    return weight if type(weight) in _PLAIN and weight.device == device else None


_PLAIN = (nn.Parameter, Tensor)


def is_plain(linear: nn.Linear, x: Tensor) -> bool:
    """Whether the linear layer has a `readable_weight` on the device of x."""
    return readable_weight(linear, x.device) is not None


def keeps_its_input(base_layer: nn.Module) -> bool:
    """Whether the base layer leaves x unchanged, and has no hook that could change it or see a gradient of x."""
    return (
        (type(base_layer) in DENSE or type(base_layer).__module__ == "bitsandbytes.nn.modules")
        and "forward" not in base_layer.__dict__
        and not has_hooks(base_layer.__dict__)
        and not is_observed()
    )


def frozen_product(base_layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a base layer, if calling it is a product of x and frozen matrices, and no more.

    Whoever patches torch's linear layer or its product (DeepSpeed, for sharded weights) gets a call.
    """
    weight = readable_weight(base_layer, x.device)
    if (
        weight is None
        or weight.dtype != x.dtype
        or weight.requires_grad
        or not _is_of(nn.Linear.forward, nn.modules.linear)
        or not _is_of(nn.Linear.__call__, nn.modules.module)
        or F.linear is not linear
        or is_observed()
    ):
        return None
    bias = cast("Tensor | None", base_layer.bias)
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype != x.dtype or bias.requires_grad):
        return None
    return weight, bias


def _is_of(function: Any, module: ModuleType) -> bool:
    """Whether torch defines the function in this module: a patch, however early, has other globals."""
    return getattr(function, "__globals__", None) is vars(module)


def owns_its_result(base_layer: nn.Module) -> bool:
    """Whether a base layer that keeps its input returns new tensors as its result and as the gradient of x.

    A dense product does. They are overwritten only where nobody else holds them either (`is_alone`).
    """
    return type(base_layer) in DENSE


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype, if autocast is on: the base layer casts x for itself, and the adapter once for its own.

    The meta device, which computes shapes alone, has no autocast.
    """
    if not is_autocasting():
        return x
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def linear_in_dtype_of(linear: nn.Linear, x: Tensor) -> Tensor:
    """x Wᵀ in the dtype of x. The weight is cast where it may be read; otherwise x is, so that wrappers see a call."""
    if (weight := readable_weight(linear, x.device)) is not None:
        return F.linear(x, weight.to(x.dtype))
    return linear(x.to(linear.weight.dtype)).to(x.dtype)

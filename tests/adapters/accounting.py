"""Exact accounts of a layer's work, without a clock: full-width traffic and saved activations."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from braidlora.adapters import _torch_state

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Unnoticed(TorchDispatchMode):
    """A mode that keeps no tensor, and counts what happens without it: the layer does not take it for an observer."""

    def __enter__(self):
        self._patch = mock.patch.object(_torch_state, "_dispatch_modes", return_value=0)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patch.stop()


class FullWidthTraffic(Unnoticed):
    """Counts what is read and written of tensors as large as an activation, in units of one activation.

    An operator reads its arguments and writes its results, each once; views are free, and so are results that are
    only allocated. A matrix added out of place (`addmm`) is copied into the result first. `unit` is tokens × width ×
    element size in bytes; tensors of at least a quarter of the activation's elements count, with the bytes they have.
    """

    def __init__(self, tokens, width, element_size):
        super().__init__()
        self.elements, self.unit, self.bytes = tokens * width, tokens * width * element_size, 0
        self.log = []

    @property
    def units(self):
        return self.bytes / self.unit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.__name__.split(".")[0] in ALLOCATIONS or func.is_view:
            return result
        written, arguments = [], {**kwargs}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            arguments[argument.name] = value
        moved = []
        for argument in func._schema.arguments:
            value = arguments.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, torch.Tensor):
                    continue
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(tensor)
                if not argument.is_out:
                    moved.append(("read", tensor))
        results = result if isinstance(result, (list, tuple)) else [result]
        moved += [("write", tensor) for tensor in (written or results) if isinstance(tensor, torch.Tensor)]
        if func is torch.ops.aten.addmm.default and args[0].shape == result.shape:
            moved += [("read", args[0]), ("write", result)]
        for what, tensor in moved:
            if tensor.numel() * 4 >= self.elements:
                self.bytes += tensor.numel() * tensor.element_size()
                self.log.append(f"{what} {tuple(tensor.shape)} {tensor.dtype} in {func.__name__}")
        return result


def traffic(layer, x, upstream):
    """Full-width units of one forward and backward."""
    with FullWidthTraffic(x.shape[0], x.shape[1], x.element_size()) as account:
        layer(x).backward(upstream)
    return account.units


def saved_for_backward(layer, x):
    """The tensors that forward keeps, without x, parameters, and what shares memory with them."""
    kept = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    for known in [x, *layer.parameters()]:
        kept.pop(known.untyped_storage().data_ptr(), None)
    return list(kept.values()), y

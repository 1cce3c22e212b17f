"""Which modules can be adapted: linear layers whose forward is called. Others are rejected or warned of."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from types import CodeType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))
# Methods that are not part of a forward: initialization, tying of weights.
_NO_FORWARD = re.compile(r"init|reset|(^|_)tie|repr")
_METADATA = {"dtype", "device", "shape", "requires_grad", "ndim", "size", "dim", "numel", "is_meta"}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer; see `linear_problem`."""
    return linear_problem(module) is None


def linear_problem(module: nn.Module) -> str | None:
    """Why `module` is not a linear layer, as the rest of a sentence that starts with its name; None if it is one.

    nn.Linear, Conv1D and their subclasses are (bitsandbytes, torchao, FP8). Any other class must have its input and
    output features as integer attributes, and then either hold a packed weight, an integer or 8-bit float matrix with
    at least one bit per weight (GPTQ, AWQ, HQQ, AQLM, EETQ, BitNet), or pass a test: it is called on random vectors,
    and f(x + y) = f(x) + f(y) - f(0) and f(100 x) - f(0) = 100 (f(x) - f(0)) must hold.
    """
    if isinstance(module, (nn.Linear, Conv1D)):
        return None
    kind = f"is a {type(module).__name__}, not a linear layer"
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention, nn.Bilinear, nn.modules.conv._ConvNd)):
        return kind
    features = _features(module)
    if features is None:
        return kind
    if _has_packed_weight(module, *features):
        return None
    reason = _why_not_linear(module, *features)
    return None if reason is None else f"{kind}: {reason}"


def _features(module: nn.Module) -> tuple[int, int] | None:
    for names in _FEATURES:
        k, d = (getattr(module, name, None) for name in names)
        if isinstance(k, int) and isinstance(d, int) and k > 0 and d > 0:
            return k, d
    return None


def _has_packed_weight(module: nn.Module, k: int, d: int) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    # AWQ and HQQ keep some tensors as plain attributes.
    tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return any(_is_packed(one) and one.numel() * one.element_size() * 8 >= k * d for one in tensors)


def _is_packed(tensor: Tensor) -> bool:
    if tensor.dim() < 2:  # a counter, or one index per row
        return False
    if tensor.dtype.is_floating_point:
        return tensor.element_size() == 1
    return tensor.dtype is not torch.bool and not tensor.dtype.is_complex


def _why_not_linear(module: nn.Module, k: int, d: int) -> str | None:
    """Call `module` on random vectors and say what no linear layer would do."""
    weights = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    if not weights:
        return "it has input and output features but no weight"
    dtype, device = weights[0].dtype, weights[0].device
    if device.type == "meta":
        return "it has no values yet (meta device), so it cannot be tested"
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, k, generator=generator).to(device, dtype)
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            results = [module(v) for v in (torch.zeros_like(x), x, y, x + y, -x, 100 * x)]
    except Exception as error:  # whatever a module raises that does not accept (…, in_features)
        return f"called on a tensor of shape (4, {k}) it raises {type(error).__name__}"
    finally:
        for part, mode in training:
            part.training = mode
    if not all(isinstance(result, Tensor) and result.shape == (4, d) for result in results):
        return f"called on a tensor of shape (4, {k}) it does not return one of shape (4, {d})"
    at_0, at_x, at_y, at_sum, at_minus, at_100 = (result.double() for result in results)
    f_x, f_y, f_100 = at_x - at_0, at_y - at_0, at_100 - at_0
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    size = float(f_x.abs().max() + f_y.abs().max() + at_0.abs().max())
    off = max(
        float((at_sum - at_0 - f_x - f_y).abs().max()),
        float((at_minus - at_0 + f_x).abs().max()),
        float((f_100 / 100 - f_x).abs().max()),
    )
    return None if off <= tolerance * size else "its result is not proportional to its input"


def bypassed_by(parent: nn.Module, child: str) -> str | None:
    """The method of `parent`, if any, that reads the weight of its module `child` instead of calling the module.

    An adapter around the child has no effect there. Found in the source of the parent's class and its bases: any
    `self.child.weight` outside of initialization, unless only its dtype, shape or device is used. Paths that the
    parent's attributes rule out (Bloom's slow_but_exact) do not count.
    """
    for cls in type(parent).__mro__:
        if cls is nn.Module:
            break
        for read in _reads(cls):
            if read.child == child and all(_may_hold(condition, parent) for condition in read.conditions):
                return f"{cls.__name__}.{read.method}"
    return None


class _Condition(NamedTuple):
    """An `if` that reads only attributes of self, and the outcome for which its branch is taken."""

    test: CodeType
    outcome: bool


class _Read(NamedTuple):
    """`self.child.weight` in a method, under conditions."""

    child: str
    method: str
    conditions: tuple[_Condition, ...]


def _may_hold(condition: _Condition, parent: nn.Module) -> bool:
    try:
        # The model's own code, which a forward would run too.
        return bool(eval(condition.test, {"__builtins__": {}}, {"self": parent})) is condition.outcome
    except Exception:  # an attribute that does not exist yet: nothing is ruled out
        return True


@functools.cache
def _reads(cls: type) -> tuple[_Read, ...]:
    """Where the methods of a class read the weights of its modules."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # defined without a source file, or in an extension
        return ()
    found: list[_Read] = []
    for method in cast(Any, tree.body[0]).body:
        if isinstance(method, ast.FunctionDef) and not _NO_FORWARD.search(method.name):
            _collect(method, method.name, (), found)
    return tuple(found)


def _collect(node: ast.AST, method: str, conditions: tuple[_Condition, ...], found: list[_Read]) -> None:
    if isinstance(node, ast.Attribute) and node.attr in _METADATA:
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "hasattr", "type"):
        return
    if isinstance(node, ast.If):
        _collect(node.test, method, conditions, found)
        for branch, outcome in ((node.body, True), (node.orelse, False)):
            more = conditions
            if _asks_self_only(node.test):
                test = compile(ast.Expression(node.test), "<condition>", "eval")
                more = (*conditions, _Condition(test, outcome))
            for statement in branch:
                _collect(statement, method, more, found)
        return
    if (
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    ):
        found.append(_Read(node.value.attr, method, conditions))
    for part in ast.iter_child_nodes(node):
        _collect(part, method, conditions, found)


def _asks_self_only(test: ast.expr) -> bool:
    return all(
        not isinstance(part, (ast.Call, ast.Await, ast.NamedExpr))
        and (not isinstance(part, ast.Name) or part.id == "self")
        for part in ast.walk(test)
    )

"""What can be wrong with an update, as sentences. Shared by the rules and the guard."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

from braidlora.federated.protocol.factors import AXES, join, split
from braidlora.federated.protocol.update import ClientUpdate

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_ROWS = 2**53  # float64 counts no further
# Of a value in an update, and of a scaling. The product of two such factors is far inside float32, and far beyond what
# any model survives.
LARGEST = 1e9
_LISTED = 4


def form_problems(update: ClientUpdate) -> list[str]:
    """What keeps an update from being looked at any further: its sender is no name, or its tensors have none."""
    if not isinstance(update.client, str):
        return [f"client is a {type(update.client).__name__}; expected its name"]
    if not isinstance(update.tensors, Mapping):
        return [f"tensors is a {type(update.tensors).__name__}; expected tensors by name"]
    strange = [name for name in update.tensors if not isinstance(name, str)]
    return (
        [f"{listing(list(map(repr, strange)))} given as names of tensors; expected text"] if strange else []
    )


def header_problems(update: ClientUpdate) -> list[str]:
    """Rows, rank, steps and scaling."""
    problems = []
    rows = update.num_examples
    if not is_whole(rows) or not 1 <= rows <= MOST_ROWS:
        problems.append(f"num_examples is {rows!r}; expected a whole number of at least 1 and at most 2**53")
    if not is_whole(update.rank) or update.rank < 0:
        problems.append(f"rank is {update.rank!r}; expected a whole number, 0 (as the tensors say) or more")
    if not is_whole(update.steps) or update.steps < 0:
        problems.append(f"steps is {update.steps!r}; expected a whole number, 0 (not told) or more")
    if not is_positive(update.scaling, LARGEST):
        problems.append(f"scaling is {update.scaling!r}; expected a number above 0 and at most {LARGEST:g}")
    return problems


def is_whole(value: object) -> bool:
    """A whole number of any kind, numpy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_positive(value: object, most: float) -> bool:
    """A real number of any kind, above 0 and at most `most`."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < cast(float, value) <= most


def name_problems(names: Iterable[str], factors: Collection[str], also: Collection[str]) -> list[str]:
    """Tensors that are not on the allow-list: the factors that the rule lets travel, and `also` by full name."""
    foreign = sorted(name for name in names if split(name)[1] not in factors and name not in also)
    if not foreign:
        return []
    allowed = [f"*.{factor}.weight" for factor in factors] + sorted(also)
    return [f"{listing(foreign)} may not travel; this rule lets through {', '.join(allowed) or 'no tensor'}"]


def tensor_problems(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, bounded: Collection[str] | None = ()
) -> list[str]:
    """Values that are no dense floating-point tensors, are of another dtype than `dtype`, or are not finite.

    Factors named in `bounded`, or all tensors where that is None, must besides have no value beyond LARGEST: a product
    of two finite factors need not be finite, and clipping or sorting cannot repair one that is not.
    """
    problems = []
    allowed = WIRE_DTYPES if dtype is None else (dtype,)
    expected = " or ".join(str(one).removeprefix("torch.") for one in allowed)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name} is a {_kind(tensor)}; expected a dense tensor")
        elif tensor.dtype not in allowed:
            problems.append(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected {expected}"
            )
        else:
            largest = _largest(tensor)
            if not math.isfinite(largest):
                bad = int((~torch.isfinite(tensor)).sum())
                problems.append(f"{name} holds {bad} values that are NaN or infinite, of {tensor.numel()}")
            elif largest > LARGEST and (bounded is None or split(name)[1] in bounded):
                problems.append(f"{name} has values of size {largest:.3g}; expected at most {LARGEST:g}")
    return _first_few(problems)


def axis_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Factors that are no matrices."""
    return _first_few(
        [
            f"{name} has shape {tuple(tensor.shape)}; expected a matrix"
            for name, tensor in tensors.items()
            if split(name)[1] in AXES and tensor.dim() != 2
        ]
    )


def shape_problems(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int | None, ...]], rank: int
) -> list[str]:
    """Missing or further names, and shapes that differ; None in a shape stands for the client's rank.

    With `rank` 0 the ranks within a layer must agree among themselves.
    """
    problems = []
    for what, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("not expected", tensors.keys() - expected.keys()),
    ):
        if names:
            problems.append(
                f"{listing(sorted(names))} {what}; {len(tensors)} tensors given, {len(expected)} expected"
            )
    ranks: dict[str, int] = {}
    wrong = []  # a tensor is named once, by what is most wrong with it
    for name in sorted(expected.keys() & tensors.keys()):
        got, shape = tuple(tensors[name].shape), expected[name]
        layer, factor = split(name)
        axis = rank_axis(factor)
        if axis is None or len(got) != len(shape):
            if got != shape:
                wrong.append(f"{name} has shape {got}; expected {shape}")
            continue
        wanted = shape[axis] if shape[axis] is not None else rank or ranks.get(layer, got[axis])
        shape = tuple(wanted if i == axis else size for i, size in enumerate(shape))
        torn = ranks.setdefault(layer, got[axis]) != got[axis]
        if got != shape:
            rest = f": rank {got[axis]} for {wanted}" if got[axis] != wanted else ""
            wrong.append(f"{name} has shape {got}; expected {shape}{rest}")
        elif torn:
            wrong.append(f"{name} has rank {got[axis]}, the layer's other factor rank {ranks[layer]}")
        elif rank and wanted != rank:
            wrong.append(f"{name} must have rank {wanted}; the update says rank {rank}")
    return problems + _first_few(wrong)


def incomplete(names: Collection[str], forms: Collection[tuple[str, ...]]) -> list[str]:
    """Factors that are missing, where of a layer some are named: of the form of which most are there.

    Args:
        names: of tensors.
        forms: the sets of factors that a layer may travel as.
    """
    given: dict[str, set[str]] = {}
    for name in names:
        layer, factor = split(name)
        if any(factor in form for form in forms):
            given.setdefault(layer, set()).add(factor)
    missing = []
    for layer in sorted(given):
        nearest = min(forms, key=lambda form: len(set(form) - given[layer]) / len(form))
        missing += [join(layer, factor) for factor in nearest if factor not in given[layer]]
    return missing


def rank_axis(factor: str) -> int | None:
    """Which axis of a factor is the client's rank."""
    axes = AXES.get(factor, ())
    return axes.index("r") if "r" in axes else None


def listing(names: Collection[str]) -> str:
    """The first few names of many."""
    shown = list(names)[:_LISTED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _kind(value: object) -> str:
    """What something that is no dense tensor is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return (
        "tensor without values (on the meta device)" if value.is_meta else f"tensor of layout {value.layout}"
    )


def _first_few(problems: list[str]) -> list[str]:
    """Of one problem of many tensors: a model has hundreds, and what is wrong with all shows in some."""
    more = len(problems) - _LISTED
    return problems[:_LISTED] + ([f"and {more} more tensors alike"] if more > 0 else [])


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, or a bound of it that is within LARGEST; NaN where a value is NaN.

    A sum of squares takes half the time of a search for the extremes, and no value exceeds its root: so it alone
    lets pass what any sane update is.
    """
    if not tensor.numel():
        return 0.0
    values = tensor.detach()
    if values.dtype in (torch.float32, torch.float64) and values.is_contiguous():
        flat = values.view(-1)
        bound = math.sqrt(float(torch.dot(flat, flat)))
        if bound <= 0.5 * LARGEST:  # far from it, so that rounding makes no difference
            return bound
    least, most = torch.aminmax(values)
    return max(-float(least), float(most))

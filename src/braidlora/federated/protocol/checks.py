"""What can be wrong with an update, as sentences, for the rules and the guard."""

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
MOST_ROWS = 2**53  # up to here float64 represents every integer
# Limit for values in an update and for a scaling. A product of two such factors is well within float32, and far beyond
# what any model survives.
LARGEST = 1e9
_LISTED = 4


def form_problems(update: ClientUpdate) -> list[str]:
    """What prevents all further checks: the sender is not a name, or the tensors have none."""
    if not isinstance(update.client, str):
        return [f"client is a {type(update.client).__name__}; expected its name"]
    if not isinstance(update.tensors, Mapping):
        return [f"tensors is a {type(update.tensors).__name__}; expected tensors by name"]
    strange = [name for name in update.tensors if not isinstance(name, str)]
    return (
        [f"{listing(list(map(repr, strange)))} given as names of tensors; expected text"] if strange else []
    )


def header_problems(update: ClientUpdate) -> list[str]:
    """Problems of the rows, rank, steps and scaling."""
    problems = []
    rows = update.num_examples
    if not is_integer(rows) or not 1 <= rows <= MOST_ROWS:
        problems.append(f"num_examples is {rows!r}; expected an integer of at least 1 and at most 2**53")
    if not is_integer(update.rank) or update.rank < 0:
        problems.append(f"rank is {update.rank!r}; expected an integer, 0 (read from the tensors) or more")
    if not is_integer(update.steps) or update.steps < 0:
        problems.append(f"steps is {update.steps!r}; expected an integer, 0 (not reported) or more")
    if not is_positive(update.scaling, LARGEST):
        problems.append(f"scaling is {update.scaling!r}; expected a number above 0 and at most {LARGEST:g}")
    return problems


def is_integer(value: object) -> bool:
    """Whether it is an integer of any type, including numpy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_positive(value: object, most: float) -> bool:
    """Whether it is a real number of any type, above 0 and at most `most`."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < cast(float, value) <= most


def name_problems(names: Iterable[str], factors: Collection[str], also: Collection[str]) -> list[str]:
    """Tensors that are not on the allow-list: the factors that the rule uploads, and `also` by full name."""
    foreign = sorted(name for name in names if split(name)[1] not in factors and name not in also)
    if not foreign:
        return []
    allowed = [f"*.{factor}.weight" for factor in factors] + sorted(also)
    return [f"{listing(foreign)} may not be sent; this rule accepts {', '.join(allowed) or 'no tensor'}"]


def tensor_problems(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, bounded: Collection[str] | None = ()
) -> list[str]:
    """Values that are not dense floating-point tensors, have another dtype than `dtype`, or are not finite.

    Factors named in `bounded`, or all tensors if that is None, must not exceed LARGEST either: a product of two finite
    factors need not be finite, and clipping or sorting cannot repair that.
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
    """Factors that are not matrices."""
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
    """Missing and unexpected names, and shapes that differ; None in a shape is the client's rank.

    With `rank` 0 the ranks within a layer must agree with each other.
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
    wrong = []  # each tensor at most once, with its worst problem
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
        disagrees = ranks.setdefault(layer, got[axis]) != got[axis]
        if got != shape:
            rest = f": rank {got[axis]} for {wanted}" if got[axis] != wanted else ""
            wrong.append(f"{name} has shape {got}; expected {shape}{rest}")
        elif disagrees:
            wrong.append(f"{name} has rank {got[axis]}, the layer's other factor rank {ranks[layer]}")
        elif rank and wanted != rank:
            wrong.append(f"{name} must have rank {wanted}; the update says rank {rank}")
    return problems + _first_few(wrong)


def incomplete(names: Collection[str], forms: Collection[tuple[str, ...]]) -> list[str]:
    """The missing factors of layers that are there in part, as the form most of which is there requires.

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
    """The axis of a factor that is the client's rank."""
    axes = AXES.get(factor, ())
    return axes.index("r") if "r" in axes else None


def listing(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    shown = list(names)[:_LISTED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _kind(value: object) -> str:
    """What a value is that is not a dense tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return (
        "tensor without values (on the meta device)" if value.is_meta else f"tensor of layout {value.layout}"
    )


def _first_few(problems: list[str]) -> list[str]:
    """The first few problems: a model has hundreds of tensors, and what is wrong with all shows in some."""
    more = len(problems) - _LISTED
    return problems[:_LISTED] + ([f"and {more} more tensors with such problems"] if more > 0 else [])


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, or an upper bound of it that is within LARGEST; NaN if a value is NaN.

    A sum of squares takes half the time of a search for the extremes, and no value exceeds its root, so for ordinary
    updates it is enough.
    """
    if not tensor.numel():
        return 0.0
    values = tensor.detach()
    if values.dtype in (torch.float32, torch.float64) and values.is_contiguous():
        flat = values.view(-1)
        bound = math.sqrt(float(torch.dot(flat, flat)))
        if bound <= 0.5 * LARGEST:  # far enough that rounding does not matter
            return bound
    least, most = torch.aminmax(values)
    return max(-float(least), float(most))

"""Dividing one task's rows among clients: at random, by shares of each label, or by the values of a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from braidlora.config import PartitionSection
from braidlora.errors import DataError
from braidlora.tasks import Part

_TRIES = 1000
Rows = dict[Part, list[int]]


def divide(values: Mapping[Part, Sequence[str]], section: PartitionSection) -> list[Rows]:
    """Row numbers of each client in each part, ascending; every row belongs to exactly one client.

    `iid` gives every client as many rows. `dirichlet` spreads the rows of each value over the clients by a draw of its
    own from Dirichlet(alpha, …, alpha) (Hsu et al., arXiv 1909.06335), and draws again until every client has
    `min_rows` training rows. Test rows are divided in the shares of the training rows, so that a client is tested on
    what it is trained for.

    Args:
        values: by part, the value of each row that decides where it goes, such as its label.
        section: `by` is `iid` or `dirichlet`, and `clients` is given.

    Raises:
        DataError: the clients cannot have `min_rows` training rows each.
    """
    assert section.clients is not None
    random = np.random.default_rng([section.seed, section.clients])
    if section.by == "iid":
        values = {part: [""] * len(rows) for part, rows in values.items()}
    known = sorted({value for rows in values.values() for value in rows})
    for _ in range(_TRIES):
        if section.by == "iid":
            shares = {value: np.full(section.clients, 1.0 / section.clients) for value in known}
        else:
            shares = {value: random.dirichlet(np.full(section.clients, section.alpha)) for value in known}
        train = _cut(values["train"], shares, random)
        if min(map(len, train)) >= section.min_rows:
            rest = {part: _cut(rows, shares, random) for part, rows in values.items() if part != "train"}
            return [
                {"train": train[client], **{part: rows[client] for part, rows in rest.items()}}
                for client in range(section.clients)
            ]
        if section.by == "iid":
            break
    raise DataError(
        f"federation.partition: {len(values['train'])} training rows cannot be divided by {section.by} so that each of "
        f"{section.clients} clients has {section.min_rows}. Take fewer clients, a lower min_rows"
        + (", or a higher alpha." if section.by == "dirichlet" else ", or more rows.")
    )


def group(values: Mapping[Part, Sequence[str]]) -> dict[str, Rows]:
    """Row numbers by value, in the order of the values' names; every value has all parts."""
    known = sorted({value for rows in values.values() for value in rows})
    return {
        value: {part: [row for row, one in enumerate(rows) if one == value] for part, rows in values.items()}
        for value in known
    }


def _cut(
    values: Sequence[str], shares: Mapping[str, np.ndarray], random: np.random.Generator
) -> list[list[int]]:
    """Row numbers per client: the rows of each value, shuffled and cut in the value's shares."""
    clients = len(next(iter(shares.values())))
    parts: list[list[int]] = [[] for _ in range(clients)]
    wanted, given = np.zeros(clients), np.zeros(clients)
    column = np.asarray(values)
    for value in sorted(shares):
        rows = random.permutation(np.flatnonzero(column == value))
        # What rounding took from a client at one value, the next one gives back.
        wanted += shares[value] * len(rows)
        counts = _rounded(wanted - given, len(rows))
        given += counts
        ends = np.cumsum(counts)
        for part, start, end in zip(parts, ends - counts, ends, strict=True):
            part.extend(rows[start:end].tolist())
    return [sorted(part) for part in parts]


def _rounded(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers, at least 0, that sum to `total` and come near `wanted` (largest remainder)."""
    wanted = np.maximum(wanted, 0.0)
    if total:
        wanted *= total / wanted.sum()
    counts: np.ndarray = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(counts - wanted, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts

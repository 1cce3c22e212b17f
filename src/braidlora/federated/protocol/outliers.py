"""Outliers: changes far larger than the others'. Size alone catches broken clients, not malicious ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple


class Typical(NamedTuple):
    """The median size of a round's changes and the median work behind them; 0 if the work is unknown."""

    size: float
    work: float = 0.0


def outliers(
    sizes: Mapping[str, float],
    before: Typical | None,
    cap: float,
    harmless: float,
    work: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Clients whose change is more than `cap` times the usual size, and why each is rejected.

    The usual size is the median over the other clients that moved at all: among two or three clients, an outlier would
    dominate a median over all. A client that worked w times as long as usual may move w² times as far: in a step of
    Adam a factor moves by at most the learning rate, which grows with the steps during warm-up, and a product of two
    factors that both move grows with their square. A client that worked less may move as far as the others.

    Args:
        sizes: by client, the root mean square of its change's entries, which is comparable across ranks.
        before: the usual values of the last round that counted, for a client without others to compare with.
        cap: the factor.
        harmless: a change of at most this size passes, however little the others moved.
        work: by client, optimizer steps, or a quantity proportional to them; by default equal for all.
    """
    found = {}
    for name in sorted(sizes):
        others = [other for other, size in sizes.items() if other != name and size > 0.0]
        usual = typical({one: sizes[one] for one in others}, work) if others else before
        if usual is None or not usual.size:
            continue
        longer = max(1.0, work[name] / usual.work) if work and usual.work else 1.0
        if sizes[name] > max(cap * usual.size * longer**2, harmless):
            whose = "the median of the other clients" if others else "the median of the last round"
            times = sizes[name] / usual.size
            found[name] = (
                f"its change is {sizes[name]:.3g} (root mean square), {times:.3g} times {whose}, {usual.size:.3g}; "
                f"federation.change_cap rejects a change of more than {cap:g} times"
                + (f", or {cap * longer**2:.3g} after {longer:.3g} times their steps" if longer > 1.0 else "")
            )
    return found


def typical(sizes: Mapping[str, float], work: Mapping[str, float] | None = None) -> Typical:
    """Medians over clients, of which there is at least one."""
    return Typical(
        statistics.median(sizes.values()),
        statistics.median(work[name] for name in sizes) if work else 0.0,
    )

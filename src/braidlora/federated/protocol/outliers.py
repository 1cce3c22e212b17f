"""Changes that are out of all proportion to the others': by size alone, which catches what is broken, not who lies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple


class Typical(NamedTuple):
    """Of the changes of a round, the median size and the median work behind them; 0 where the work is not known."""

    size: float
    work: float = 0.0


def outliers(
    sizes: Mapping[str, float],
    before: Typical | None,
    cap: float,
    harmless: float,
    work: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Clients whose change is more than `cap` times what is usual, and why each is left out.

    Usual is the median of the others that moved at all: among two or three clients, one that is out of proportion would
    make up half of a median of all. Who worked w times as long as is usual may have moved w² times as far: a factor
    moves at most by the learning rate in a step of Adam, which a warm-up makes grow with the steps, and a product of
    two factors that both move grows with their square. Who worked less may have moved as far as the others.

    Args:
        sizes: by client, the root mean square of its change's entries, so that clients of different ranks compare.
        before: what was usual in the last round that counted, for a client that has no others to compare with.
        cap: the factor.
        harmless: a change of at most this size passes, however little the others moved.
        work: by client, optimizer steps, or anything that they are in proportion to; left out, all count alike.
    """
    found = {}
    for name in sorted(sizes):
        others = [other for other, size in sizes.items() if other != name and size > 0.0]
        usual = typical({one: sizes[one] for one in others}, work) if others else before
        if usual is None or not usual.size:
            continue
        longer = max(1.0, work[name] / usual.work) if work and usual.work else 1.0
        if sizes[name] > max(cap * usual.size * longer**2, harmless):
            whose = "the median of the others'" if others else "what was usual in the last round"
            times = sizes[name] / usual.size
            found[name] = (
                f"its change is {sizes[name]:.3g} (root mean square), {times:.3g} times {whose}, {usual.size:.3g}; "
                f"federation.change_cap leaves out a client beyond {cap:g} times"
                + (f", or {cap * longer**2:.3g} after {longer:.3g} times their steps" if longer > 1.0 else "")
            )
    return found


def typical(sizes: Mapping[str, float], work: Mapping[str, float] | None = None) -> Typical:
    """Medians over clients, of which there is at least one."""
    return Typical(
        statistics.median(sizes.values()),
        statistics.median(work[name] for name in sizes) if work else 0.0,
    )

"""Changes that are out of all proportion to the others': by size alone, which catches what is broken, not who lies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping


def outliers(sizes: Mapping[str, float], before: float | None, cap: float, harmless: float) -> dict[str, str]:
    """Clients whose change is more than `cap` times what is usual, and why each is left out.

    Usual is the median of the others that moved at all: among two or three clients, one that is out of proportion would
    make up half of a median of all.

    Args:
        sizes: by client, the root mean square of its change's entries, so that clients of different ranks compare.
        before: what was usual in the last round that counted, for a client that has no others to compare with.
        cap: the factor.
        harmless: a change of at most this size passes, however little the others moved.
    """
    found = {}
    for name in sorted(sizes):
        others = [size for other, size in sizes.items() if other != name and size > 0.0]
        usual = statistics.median(others) if others else before
        if usual and sizes[name] > max(cap * usual, harmless):
            whose = "the median of the others'" if others else "what was usual in the last round"
            found[name] = (
                f"its change is {sizes[name]:.3g} (root mean square), {sizes[name] / usual:.3g} times {whose}, "
                f"{usual:.3g}; federation.change_cap leaves out a client beyond {cap:g} times"
            )
    return found

"""Figures that follow the page: colors that matplotlib wrote become variables, which the style sheet sets per mode."""

from __future__ import annotations

import re

# Of `plot.COLORS`, and of what axes, grids and marks are drawn in.
_VARIABLES = {
    "#0072b2": "blue",
    "#1f77b4": "blue",  # matplotlib's default, of marks whose fill is not seen
    "#e69f00": "orange",
    "#009e73": "green",
    "#cc79a7": "pink",
    "#56b4e9": "sky",
    "#d55e00": "vermilion",
    "#f0e442": "yellow",
    "#000000": "ink",
    "#222222": "ink",
    "#333333": "ink",
    "#808080": "soft",
    "#8a8a8a": "soft",
    "#b0b0b0": "line",
    "#cccccc": "line",
    "#ffffff": "page",
}
_COLOR = re.compile(r"(?P<key>\b(?:fill|stroke|stop-color): ?)(?P<color>#[0-9a-f]{6})\b", re.IGNORECASE)


def themed(svg: str) -> str:
    """The SVG with `fill: var(--fig-blue, #0072b2)` for `fill: #0072b2`; colors of images and heat maps stay."""

    def variable(match: re.Match[str]) -> str:
        color = match["color"].lower()
        name = _VARIABLES.get(color)
        return match[0] if name is None else f"{match['key']}var(--fig-{name}, {color})"

    return _COLOR.sub(variable, svg)

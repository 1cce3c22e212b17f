"""Draw the pictures of docs/concepts as SVG files in docs/figures; they need no network and no plotting library.

python scripts/draw_concepts.py          # writes
python scripts/draw_concepts.py --check  # exits with 1 if a file differs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
# Colors of Okabe and Ito, which also differ for color-blind readers: A, B, router, base.
A, B, ROUTER, BASE, INK = "#56b4e9", "#e69f00", "#cc79a7", "#d9d9d9", "#222222"


class Drawing:
    """An SVG on a white card, so that it reads the same on a light and on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{fill}" stroke="{INK}"/>'
        )
        self.text(x + w / 2, y + h / 2 + 5, text)

    def text(
        self, x: float, y: float, text: str, *, size: int = 14, anchor: str = "middle", bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, arrow: bool = False, dashed: bool = False
    ) -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" stroke-width="1.5"{dash}{end}/>'
        )

    def dot(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{INK}"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="sans-serif" fill="{INK}">'
        )
        marker = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
        )
        card = f'<rect width="{self.width}" height="{self.height}" rx="8" fill="#ffffff"/>'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", marker, card, *self.parts, "</svg>", ""]
        )


def sharing() -> Drawing:
    """One adapted layer under each scheme, with three experts: how many A, how many B, and where the router is."""
    drawing = Drawing(880, 330, "The four schemes: which matrices the experts share")
    schemes = (
        ("LoRA", "one A, one B", 1, 1),
        ("ALoRA", "many A, one B", 3, 1),
        ("HydraLoRA", "one A, many B", 1, 3),
        ("MoE-LoRA", "many A, many B", 3, 3),
    )
    for place, (name, what, number_a, number_b) in enumerate(schemes):
        left = 16 + 216 * place
        middle = left + 100
        drawing.text(middle, 30, name, size=17, bold=True)
        drawing.text(middle, 50, what)
        drawing.text(middle, 316, "x")
        routed = number_a * number_b > 1
        places = {
            number: [middle - 29 * number + 58 * index + 29 for index in range(number)] for number in (1, 3)
        }
        for index, x in enumerate(places[number_a]):
            drawing.line(middle, 300, x, 248, arrow=True)
            drawing.line(x, 206, x, 188 if routed else 122, arrow=True)
            drawing.box(x - 26, 206, 52, 40, f"A{'₁₂₃'[index] if number_a > 1 else ''}", A)
        for index, x in enumerate(places[number_b]):
            if routed:
                drawing.line(x if number_a == number_b else middle, 152, x, 120, arrow=True)
            drawing.box(x - 26, 78, 52, 40, f"B{'₁₂₃'[index] if number_b > 1 else ''}", B)
        if routed:
            drawing.box(middle - 92, 152, 184, 34, "× w₁, w₂, w₃ of the router", ROUTER)
        drawing.line(middle, 76, middle, 58, arrow=True)
    return drawing


def intervals() -> Drawing:
    """Three 95% CIs of a paired difference, and what follows from each."""
    drawing = Drawing(760, 230, "Three confidence intervals and what to do")
    zero = 250
    drawing.line(zero, 20, zero, 190, dashed=True)
    drawing.text(zero, 212, "0: the same score as LoRA")
    rows = (
        ("worse", -190, -130, -60, "the interval is below 0: do not use this method"),
        ("better", 50, 110, 180, "above 0: use it, then measure the cost of exporting it"),
        ("unknown", -70, 30, 130, "contains 0: not significantly different, use LoRA"),
    )
    for place, (_, low, middle, high, text) in enumerate(rows):
        y = 44 + 54 * place
        drawing.line(zero + low, y, zero + high, y)
        drawing.line(zero + low, y - 6, zero + low, y + 6)
        drawing.line(zero + high, y - 6, zero + high, y + 6)
        drawing.dot(zero + middle, y)
        drawing.text(450, y + 5, text, size=13, anchor="start")
    return drawing


def federation() -> Drawing:
    """One round of Fed-ALoRA: only B is sent."""
    drawing = Drawing(760, 330, "One round of Fed-ALoRA: only B is sent; A and the rows stay on the client")
    drawing.box(290, 20, 180, 46, "server: B ← Σ pᵢ Bᵢ", B)
    for place, name in enumerate(("north", "south", "west")):
        left = 30 + 245 * place
        middle = left + 105
        drawing.parts.append(
            f'<rect x="{left}" y="170" width="210" height="140" rx="8" fill="none" stroke="{INK}" '
            'stroke-dasharray="5 4"/>'
        )
        drawing.text(middle, 192, f"client {name}", bold=True)
        drawing.box(left + 16, 204, 82, 40, "A stays", A)
        drawing.box(left + 112, 204, 82, 40, "B", B)
        drawing.box(left + 16, 256, 178, 40, "own rows stay", BASE)
        target = 340 + 40 * place
        drawing.line(middle - 12, 168, target - 12, 68, arrow=True)
        drawing.line(target + 8, 68, middle + 12, 168, arrow=True)
    drawing.text(88, 118, "Bᵢ up, B down", size=13)
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "sharing.svg": sharing,
    "intervals.svg": intervals,
    "federation.svg": federation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, draw in DRAWINGS.items():
        path, text = FIGURES / name, draw().svg()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/figures/{name} is out of date. Run: python scripts/draw_concepts.py")


if __name__ == "__main__":
    main()

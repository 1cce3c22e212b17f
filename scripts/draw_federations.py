"""Plot scores and bytes of the rules of one table.

    python scripts/draw_federations.py fed-sentences    # benchmarks/results/… -> docs/figures/fed-sentences.png

The table must have a single group of rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from braidlora.reporting.plot import COLORS, HATCHES, Plot, new_figure

ROOT = Path(__file__).parent.parent


def draw(name: str) -> Plot:
    """The rows of one group from top to bottom: mean over clients with its spread over seeds, bytes up and down."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    [group] = result["groups"].values()
    rows = group["rows"]
    places = range(len(rows))
    figure, (scores, sent) = new_figure(8.4, 0.9 + 0.3 * len(rows), 1, 2, sharey=True)
    for place, row in zip(places, rows.values(), strict=True):
        values, mean = row["mean"]["values"], row["mean"]["mean"]
        scores.plot(values, [place] * len(values), "|", color="#777777", markersize=9)
        scores.errorbar(mean, place, xerr=row["mean"]["std_seeds"], fmt="o", color=COLORS[0], capsize=3)
    if "local" in rows:
        scores.axvline(rows["local"]["mean"]["mean"], color="#555555", linewidth=0.8, linestyle="--")
    scores.set_yticks(places, rows)
    scores.invert_yaxis()
    scores.set_xlabel("mean score over clients (bars: standard deviation over seeds)")
    for way, offset, style in (("up", -0.19, 0), ("down", 0.19, 1)):
        kilobytes = [row["bytes_per_client_and_round"][way] / 1000 for row in rows.values()]
        sent.barh(
            [place + offset for place in places], kilobytes, 0.36, color=COLORS[style + 1],
            hatch=HATCHES[style], edgecolor="white", label=way,
        )  # fmt: skip
    sent.set_xlabel("kB per client and round")
    sent.legend()
    return Plot(name, "Scores and bytes of aggregation rules", "", figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table")
    name = parser.parse_args().table
    png, svg = draw(name).save(ROOT / "docs" / "figures")
    svg.unlink()
    print(f"written to {png}")


if __name__ == "__main__":
    main()

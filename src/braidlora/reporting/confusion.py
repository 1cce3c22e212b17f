"""Confusion matrices of label tasks, from prediction files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from braidlora.reporting.heat_map import heat_map
from braidlora.reporting.plot import Plot, new_figure, style

OTHER = "(other)"
_MOST = 30  # labels; a larger matrix could not be read
_SAID = 3  # confusions that the caption names


@dataclass(frozen=True)
class Confusion:
    """How often which label was answered.

    Attributes:
        labels: of the rows, then of the columns; columns may have `OTHER` in addition, for answers that are no label.
        counts: by right label and answered label.
    """

    labels: list[str]
    counts: dict[tuple[str, str], int]

    @property
    def columns(self) -> list[str]:
        other = any(answer == OTHER for _, answer in self.counts)
        return [*self.labels, OTHER] if other else self.labels

    def recall(self, label: str) -> float | None:
        """The share of the label's rows that were answered with it, in percent; None without rows."""
        rows = sum(count for (right, _), count in self.counts.items() if right == label)
        return 100.0 * self.counts.get((label, label), 0) / rows if rows else None

    def precision(self, label: str) -> float | None:
        """The share of this answer that was right, in percent; None if it was never given."""
        given = sum(count for (_, answer), count in self.counts.items() if answer == label)
        return 100.0 * self.counts.get((label, label), 0) / given if given else None

    def worst(self) -> list[tuple[str, str, int]]:
        """Right label, answered label and count of the confusions, the most frequent first."""
        wrong = [(right, answer, count) for (right, answer), count in self.counts.items() if right != answer]
        return sorted(wrong, key=lambda one: (-one[2], one[:2]))


def confusion(records: Sequence[Mapping[str, Any]], labels: Sequence[str] | None) -> Confusion | None:
    """Count the answers of a label task; None if it is not one, or has too many labels.

    Args:
        records: of its prediction file.
        labels: of the task, in order, if they are known.
    """
    pairs = []
    for record in records:
        right, answer = record["reference"], record["extracted"] or record["prediction"]
        if not isinstance(right, str):
            return None
        pairs.append((right, answer))
    known = list(dict.fromkeys([*(labels or []), *sorted({right for right, _ in pairs})]))
    if not labels or not pairs or not 2 <= len(known) <= _MOST:
        return None
    spelled = {label.strip().lower(): label for label in known}

    def label_of(answer: Any) -> str:
        return answer if answer in known else spelled.get(str(answer).strip().lower(), OTHER)

    return Confusion(known, dict(Counter((right, label_of(answer)) for right, answer in pairs)))


@style()
def confusion_plot(task: str, found: Confusion) -> Plot:
    """The matrix: rows are right labels, columns answers, cells counts; colors are shares of the row."""
    columns = found.columns
    counts = [[found.counts.get((right, answer), 0) for answer in columns] for right in found.labels]
    shares = [[count / (sum(row) or 1) for count in row] for row in counts]
    side = 1.6 + 0.42 * max(len(columns), 3)
    figure, axes = new_figure(min(9.5, side + 1.6), min(9.0, side))
    image = heat_map(axes, shares, found.labels, columns, written=False)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count:
                color = "#fefefe" if shares[row][column] < 0.5 else "#010101"
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("answer")
    axes.set_ylabel("right label")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    worst = [f"{right} as {answer} ({count} times)" for right, answer, count in found.worst()[:_SAID]]
    said = f" Most often wrong: {', '.join(worst)}." if worst else " All answers are correct."
    return Plot(
        f"confusion-{''.join(c if c.isalnum() else '-' for c in task)}",
        f"Answers of {task} by correct label",
        f"Rows are the correct labels, columns the answers; each cell has the number of test rows.{said}",
        figure,
    )

"""Select the rows of a task while its source is streamed: filter, check and draw. Other rows take no memory."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from braidlora.config import DataSource, RunConfig, TaskSection
from braidlora.errors import DataError
from braidlora.tasks._task import Counts, Part, Row, WrongColumns
from braidlora.tasks.columns import near_column
from braidlora.tasks.read import RawRow
from braidlora.tasks.rows import BadRow, column_text, matches, to_row

_REASONS = 5  # bad rows quoted in the counts
_VALUES = 1000  # values of a column remembered for a message
_SHARED_LENGTH = 64  # texts up to this length (labels, answers) often recur and are stored once


class Selection:
    """The selected rows of one part of one task.

    Attributes:
        rows: the selected rows.
        counts: what happened to the rows of the source.
        labels: all labels of a `classify` task, including those of rows that `limit` excludes.
    """

    def __init__(
        self,
        section: TaskSection,
        part: Part,
        source: DataSource,
        config: RunConfig,
        kept_column: str | None = None,
    ) -> None:
        self.section, self.part, self.source, self.config = section, part, source, config
        self.kept_column = kept_column
        self.rows: list[Row] = []
        self.counts = Counts()
        self.labels: set[str] = set()
        self.drawn: set[int] = set()  # places in the source of the rows that `limit` keeps, if there are more
        self._places = array("q")  # of all usable rows
        self._columns: dict[str, None] = {}
        self._values: dict[str, set[str]] = {column: set() for column in source.where}
        self._texts: dict[str, str] = {}

    def offer(self, place: int, raw: RawRow) -> None:
        """Filter and check a row of the source; `place` is its index, from 0.

        Raises:
            DataError: the row is bad, and prompt.bad_rows is `stop`.
        """
        counts = self.counts
        counts.read += 1
        if raw.problem is None and not matches(raw.columns, self.source.where):
            counts.filtered += 1
            if not self._places:
                self._remember(raw)
            return
        try:
            row = self._row(raw)
        except BadRow as problem:
            message = f"{raw.place}: {problem}"
            if self.config.prompt.bad_rows == "stop":
                where = f"(task {self.section.name}, {self.part})"
                if (
                    isinstance(problem, WrongColumns) and not self._places
                ):  # then the recipe is wrong, not a row
                    raise DataError(f"{message} {where}.") from None
                raise DataError(
                    f"{message} {where}. Fix the row, or set prompt.bad_rows=skip to skip and count such rows."
                ) from None
            counts.skipped += 1
            if len(counts.problems) < _REASONS:
                counts.problems.append(message)
            return
        if self.section.kind == "classify":
            self.labels.add(row["label"])  # before `limit`: also labels of which no row is drawn
        self._places.append(place)
        if self.source.limit is None or len(self._places) <= self.source.limit:
            self.rows.append(row)
        else:
            self.rows.clear()  # which rows are drawn depends on how many there are

    def draw(self) -> None:
        """After the last row: draw the rows that `limit` keeps.

        Raises:
            DataError: there is no usable row.
        """
        self._texts.clear()
        found, limit = len(self._places), self.source.limit
        if not found:
            raise DataError(self._empty())
        if limit is not None and limit < found:
            self.counts.not_drawn = found - limit
            # The first `limit` rows of one shuffled order, so that a larger limit includes the rows of a smaller one.
            seed = self.config.seed if self.part == "train" else self.config.split.seed
            order = list(range(found))
            random.Random(f"{seed}/{self.section.name}/{self.part}").shuffle(order)
            self.drawn = {self._places[index] for index in order[:limit]}
        self._places = array("q")

    def take(self, raw: RawRow) -> None:
        """Keep a drawn row in the second pass.

        Raises:
            DataError: the source has changed between the passes.
        """
        try:
            self.rows.append(self._row(raw))
        except BadRow as problem:
            raise DataError(f"{raw.place}: the file changed during reading: {problem}.") from None

    def _row(self, raw: RawRow) -> Row:
        row = to_row(raw, self.section, self.part)
        if self.kept_column is not None:
            row["column"] = column_text(raw, self.kept_column)
        if len(self._texts) < _VALUES:
            for text in row.values():
                if isinstance(text, str) and len(text) <= _SHARED_LENGTH:
                    self._texts.setdefault(text, text)
        row.update(
            {field: self._texts.get(text, text) for field, text in row.items() if isinstance(text, str)}
        )
        return row

    def _remember(self, raw: RawRow) -> None:
        if self.counts.read <= 100:
            self._columns.update(dict.fromkeys(map(str, raw.columns)))
        for column, values in self._values.items():
            if column in raw.columns and len(values) < _VALUES:
                values.add(str(raw.columns[column])[:200])

    def _empty(self) -> str:
        counts, source = self.counts, self.source
        start = f"task {self.section.name}, {self.part}: no rows"
        if not counts.read:
            return f"{start}: {source.source} is empty."
        if counts.filtered and not counts.skipped:
            known = []
            for column, found in self._values.items():
                values = sorted(found)
                near = None if values else near_column(column, self._columns)
                meant = f"; did you mean {near!r}?" if near else ""
                known.append(
                    f"the values of {column!r} are {', '.join(values[:20])}{', …' if len(values) > 20 else ''}"
                    if values
                    else f"there is no column {column!r} (the columns are {', '.join(sorted(self._columns))}){meant}"
                )
            return (
                f"{start}: none of the {counts.read} rows of {source.source} matches where={source.where}; "
                f"{'; '.join(known)}."
            )
        return (
            f"{start}: of {counts.read} rows of {source.source}, {counts.filtered} were filtered out and "
            f"{counts.skipped} were bad. The first: {counts.problems[0]}."
        )


def select(selections: Sequence[Selection], rows: Callable[[], Iterable[RawRow]]) -> None:
    """Fill all selections from one source, which is read once, and a second time if `limit` excludes rows.

    Args:
        selections: all selections from this source.
        rows: reads the source from its start.

    Raises:
        DataError: a row is bad, a selection has no rows, or memory ran out.
    """
    try:
        for place, raw in enumerate(rows()):
            for selection in selections:
                selection.offer(place, raw)
        for selection in selections:
            selection.draw()
        drawn = [selection for selection in selections if selection.drawn]
        for place, raw in _up_to(rows, max((max(one.drawn) for one in drawn), default=-1)):
            for selection in drawn:
                if place in selection.drawn:
                    selection.take(raw)
    except MemoryError:
        for selection in selections:
            selection.rows = []
        names = ", ".join(dict.fromkeys(selection.section.name for selection in selections))
        raise DataError(
            f"{selections[0].source.source}: out of memory while reading the rows of {names}. Free memory, or set "
            "`limit` or `where`: rows that they exclude take no memory."
        ) from None


def _up_to(rows: Callable[[], Iterable[RawRow]], last: int) -> Iterator[tuple[int, RawRow]]:
    if last < 0:
        return
    for place, raw in enumerate(rows()):
        yield place, raw
        if place == last:
            return
    raise DataError(
        "a data file became shorter during reading; do not change data files while a command runs."
    )

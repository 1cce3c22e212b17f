"""Preference data is recognized, so that nobody imitates rejected answers by mistake. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braidlora.tasks._task import WrongColumns

_PAIRS = (("chosen", "rejected"), ("chosen", "reject"), ("response_0", "response_1"))


def refuse_preferences(columns: Mapping[str, Any], named: Mapping[Any, str]) -> None:
    """Raise if a row compares two answers, or judges one, unless the recipe names the column to imitate.

    Args:
        columns: of the row.
        named: the recipe's `columns`.

    Raises:
        WrongColumns: what it is, and where to go.
    """
    used = set(named.values())
    for better, worse in _PAIRS:
        if better in columns and worse in columns and not {better, worse} & used:
            field = "messages" if isinstance(columns[better], list) else "output"
            raise WrongColumns(
                f"this is preference data (a {better!r} and a {worse!r} answer per row), but braidlora trains on "
                "one correct answer per row. For preference training, use TRL: DPOTrainer, or `trl dpo`. To train "
                f"on the better answers only, set columns.{field}={better}"
            )
    if isinstance(columns.get("label"), bool) and "completion" in columns and "completion" not in used:
        raise WrongColumns(
            "this is preference data (a 'completion' judged by a true or false 'label'), but braidlora trains on "
            "correct answers. For judged answers, use TRL's KTOTrainer. To train on the good ones only, set "
            "columns.output=completion, columns.instruction=prompt and where.label=true"
        )

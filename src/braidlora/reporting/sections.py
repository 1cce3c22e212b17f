"""What a page is made of: a headline, and sections of text, tables, figures and listings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from braidlora.tables import UNKNOWN, Table, TableRow

if TYPE_CHECKING:
    from braidlora.reporting.plot import Plot


@dataclass(frozen=True)
class Headline:
    """The top of the page.

    Args:
        kind: what the report is about, a word or two.
        title: its name.
        verdict: sentences; the first stands out.
        facts: what the verdict is based on, a few words each.
        findings: what to know before any score, one line each.
    """

    kind: str
    title: str
    verdict: Sequence[str]
    facts: Sequence[str]
    findings: Sequence[str] = ()


@dataclass(frozen=True)
class Listing:
    """Text that is shown verbatim: a recipe, a command."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page; its contents are shown in the order of the fields."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    listings: Sequence[Listing] = ()
    more_tables: Sequence[Table] = ()


def origin_section(
    command: str, recipe: str, environment: Mapping[str, Any], tables: Sequence[Table] = ()
) -> Section:
    """How to run it again: command, resolved recipe, further tables, and the environment."""
    return Section(
        "origin",
        "How to run it again",
        text=("The same command resumes where it was stopped and reuses finished runs.",),
        listings=(Listing("Command", command), Listing("Recipe, including all defaults", recipe)),
        more_tables=(*tables, environment_table(environment)),
    )


def environment_table(environment: Mapping[str, Any]) -> Table:
    """Versions, machine, threads and date, one line each, as `braidlora.runs.environment` returns them."""
    machine = environment["machine"]
    known = {
        **environment["versions"],
        "system": machine["system"],
        "processor": machine["processor"],
        "processors": machine["cpus"],
        "devices": ", ".join(machine["devices"] or []) or None,
        "threads": environment["threads"],
        "date": environment["date"],
    }
    rows = [TableRow(name, [UNKNOWN if value is None else str(value)]) for name, value in known.items()]
    return Table("environment", "Environment", ("Item", "Value"), rows, text_columns=(0, 1))

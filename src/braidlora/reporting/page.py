"""`report.html`: one static page from metrics files; it opens from disk without network, script or further files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora import __version__
from braidlora.errors import ConfigError
from braidlora.reporting.comparison_sections import (
    comparison_headline,
    comparison_origin,
    comparison_sections,
)
from braidlora.reporting.federated_sections import (
    federated_headline,
    federated_origin,
    federated_sections,
)
from braidlora.reporting.sections import Headline, Section, environment_table
from braidlora.runs import atomic_write_text

if TYPE_CHECKING:
    from jinja2 import Template

    from braidlora.reporting.plot import Plot

_HERE = Path(__file__).parent
_SMALLEST = 0.7  # of a figure's size, to which a narrow page may shrink it; from there on it scrolls


def write_report(
    directory: Path,
    comparison: dict[str, Any] | None,
    analysis: dict[str, Any] | None = None,
    federated: dict[str, Any] | None = None,
) -> Path:
    """Write `directory/report.html`, and its figures as PNG and SVG into `directory/figures`.

    Args:
        directory: where `comparison.json` stands; the runs that it names are found from here.
        comparison: what `comparison.json` holds.
        analysis: what `analysis.json` holds.
        federated: what `read_federation` gives of a federated run.

    Returns:
        the path of the page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
        CheckpointError: a run's log is damaged.
        ValueError: nothing to report on was given.
    """
    template = _template()
    headline: Headline | None = None
    sections: list[Section] = []
    origin: list[Section] = []
    if comparison is not None:
        headline = comparison_headline(comparison)
        sections += comparison_sections(comparison, directory)
        origin = [comparison_origin(comparison)]
    if analysis is not None:
        section = _analysis_section(analysis)
        labels = [adapter["label"] for adapter in analysis.get("adapters", [])]
        headline = headline or Headline("Analysis", ", ".join(labels) or "Study", section.text, [])
        sections.append(section)
        origin = origin or [
            Section("origin", "Where it was made", tables=[environment_table(analysis["environment"])])
        ]
    if federated is not None:
        headline = headline or federated_headline(federated)
        sections += federated_sections(federated)
        origin = origin or [federated_origin(federated)]
    if headline is None:
        raise ValueError("write_report: give a comparison, an analysis or a federated run; all are None")
    sections += origin
    figures = {
        plot.name: _inline(plot, directory / "figures") for section in sections for plot in section.plots
    }
    page = template.render(headline=headline, sections=sections, figures=figures, version=__version__)
    path = directory / "report.html"
    atomic_write_text(path, page)
    return path


def _template() -> Template:
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ConfigError("the report needs jinja2 and matplotlib: pip install 'braidlora[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _analysis_section(analysis: dict[str, Any]) -> Section:
    """The figures of an analysis, and the findings of a study where it is one."""
    from braidlora.reporting.analysis_plots import analysis_plots
    from braidlora.reporting.plot import style

    if "study" in analysis:
        text = [finding["text"] for finding in analysis["study"]["verdict"].values()]
    else:
        labels = [adapter["label"] for adapter in analysis.get("adapters", [])]
        text = [f"Looked at: {', '.join(labels)}."] if labels else []
    with style():
        plots = analysis_plots(analysis)
    return Section("analysis", "Inside the adapters", text, plots=plots)


def _inline(plot: Plot, figures: Path) -> str:
    """Save the plot, and give its SVG in the form that can stand in a page beside others.

    matplotlib numbers its elements anew in every figure, so the ids get the plot's name before them; its metadata and
    its rule for all elements (`*`) would speak for the whole page. Two heat maps of one figure that look alike get the
    same id from it, a hash of the image, to which nothing refers.
    """
    _, path = plot.save(figures)
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = _told_apart(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg))
    width = float(svg.split('width="', 1)[1].split("pt", 1)[0])
    named = f'role="img" aria-labelledby="{plot.name}-title" aria-describedby="{plot.name}-caption"'
    return svg.replace("<svg", f'<svg {named} style="min-width: {_SMALLEST * width:.0f}pt"', 1)


def _told_apart(svg: str) -> str:
    """The same SVG with a number after every id that was given before."""
    given: Counter[str] = Counter()

    def once(match: re.Match[str]) -> str:
        given[match[1]] += 1
        return match[0] if given[match[1]] == 1 else f'id="{match[1]}-{given[match[1]]}"'

    return re.sub(r'\bid="([^"]*)"', once, svg)

"""`report.html`: one static page from metrics files; it opens from disk without network, script or further files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora import __version__
from braidlora.errors import ConfigError
from braidlora.reporting.analysis_plots import analysis_plots
from braidlora.reporting.comparison_sections import (
    comparison_headline,
    comparison_origin,
    comparison_sections,
)
from braidlora.reporting.dark_mode import themed
from braidlora.reporting.federated_sections import federated_headline, federated_sections
from braidlora.reporting.run_sections import run_headline, run_origin, run_sections
from braidlora.reporting.sections import Headline, Section, environment_table, origin_section
from braidlora.runs import atomic_write_text

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

    from braidlora.reporting.plot import Plot

_HERE = Path(__file__).parent
# An option with its value. Browsers break lines after its hyphens, where it can no longer be read.
_FLAG = re.compile(r"(?<![\w-])(--[A-Za-z](?:[\w.*=,-]*\w)?)")
_PHONE = 250.0  # points across that a phone shows at once
_SMALLEST = 0.7  # of a figure's size: a narrow page shrinks it to this, and then scrolls


def write_report(
    directory: Path,
    comparison: dict[str, Any] | None,
    analysis: dict[str, Any] | None = None,
    federated: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write `directory/report.html`, and its figures as PNG and SVG into `directory/figures`.

    Args:
        directory: the folder of `comparison.json`; the paths of its runs are relative to it.
        comparison: the content of `comparison.json`.
        analysis: the content of `analysis.json`.
        federated: what `read_federation` returns for a federated run.
        run: what `read_run` returns for a training run.

    Returns:
        the path of the page.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
        CheckpointError: a run's log is damaged.
        ValueError: comparison, analysis, federated and run are all None.
    """
    template = _template()
    headline: Headline | None = None
    origin: Section | None = None
    sections: list[Section] = []
    if comparison is not None:
        headline, origin = comparison_headline(comparison), comparison_origin(comparison)
        sections += comparison_sections(comparison, directory)
    if analysis is not None:
        section = _analysis_section(analysis)
        labels = [adapter["label"] for adapter in analysis.get("adapters", [])]
        headline = headline or Headline("Analysis", ", ".join(labels) or "Study", section.text, [])
        origin = origin or Section(
            "origin", "Environment", tables=[environment_table(analysis["environment"])]
        )
        sections.append(section)
    if federated is not None:
        ran = federated["command"], federated["recipe"], federated["environment"]
        headline, origin = headline or federated_headline(federated), origin or origin_section(*ran)
        sections += federated_sections(federated)
    if run is not None:
        headline, origin = headline or run_headline(run), origin or run_origin(run)
        sections += run_sections(run, directory)
    if headline is None or origin is None:
        raise ValueError(
            "write_report: give a comparison, an analysis, a federated run or a run; all are None"
        )
    sections.append(origin)
    plots = [plot for section in sections for plot in section.plots]
    figures = {plot.name: _inline(plot, directory / "figures") for plot in plots}
    wide = {plot.name: _SMALLEST * plot.figure.get_figwidth() * 72 > _PHONE for plot in plots}
    page = template.render(
        headline=headline, sections=sections, figures=figures, wide=wide, version=__version__
    )
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
    environment.filters["minus"] = _minus
    environment.filters["prose"] = _prose
    return environment.get_template("page.html.j2")


def _minus(text: str) -> str:
    """`text` with a true minus sign before numbers; a hyphen inside a word stays."""
    return re.sub(r"(?<![^\s\[(])-(?=\d)", "−", text)


def _prose(text: str) -> Markup:
    """A sentence, escaped, with true minus signs and what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner
        parts = [text]
    marked = []
    for at, part in enumerate(parts):
        code = at % 2 == 1
        flag = Markup('<span class="flag">{}</span>' if code else '<code class="flag">{}</code>')
        pieces = [
            flag.format(piece) if odd % 2 else escape(piece if code else _minus(piece))
            for odd, piece in enumerate(_FLAG.split(part))
        ]
        marked.append(Markup("<code>{}</code>" if code else "{}").format(Markup("").join(pieces)))
    return Markup("").join(marked)


def _analysis_section(analysis: dict[str, Any]) -> Section:
    """The figures of an analysis, and the findings if it is a study."""
    if "study" in analysis:
        text = [finding["text"] for finding in analysis["study"]["verdict"].values()]
    else:
        labels = [adapter["label"] for adapter in analysis.get("adapters", [])]
        text = [f"Analyzed: {', '.join(labels)}."] if labels else []
    return Section("analysis", "Inside the adapters", text, plots=analysis_plots(analysis))


def _inline(plot: Plot, figures: Path) -> str:
    """Save the plot, and return its SVG in a form that can share a page with others.

    matplotlib numbers its elements from 1 in every figure, so the plot's name is put before their ids. Its metadata
    and its style rule for all elements (`*`) would apply to the entire page and are removed.
    """
    _, path = plot.save(figures)
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = _with_unique_ids(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg))
    svg = themed(svg)
    width = float(svg.split('width="', 1)[1].split("pt", 1)[0])
    named = f'role="img" aria-labelledby="{plot.name}-title" aria-describedby="{plot.name}-caption"'
    return svg.replace("<svg", f'<svg {named} style="min-width: {_SMALLEST * width:.0f}pt"', 1)


def _with_unique_ids(svg: str) -> str:
    """The same SVG with a number after every repeated id.

    Two identical heat maps of one figure get the same id, a hash of the image, which nothing refers to.
    """
    given: Counter[str] = Counter()

    def once(match: re.Match[str]) -> str:
        given[match[1]] += 1
        return match[0] if given[match[1]] == 1 else f'id="{match[1]}-{given[match[1]]}"'

    return re.sub(r'\bid="([^"]*)"', once, svg)

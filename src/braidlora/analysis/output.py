"""The folder of an analysis, recognized by its `analysis.json`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from braidlora import __version__
from braidlora.errors import ConfigError, explain_write_failures
from braidlora.json_text import loads
from braidlora.runs import (
    RunDirectory,
    atomic_write_json,
    environment,
    is_leftover,
    is_lock,
    refuse_links,
    remove_leftovers,
)

RESULT = "analysis.json"
_SUFFIXES = (".png", ".svg")


class AnalysisDirectory:
    """`analysis.json` and its figures. An older analysis is replaced; a folder with any other file is rejected.

    Args:
        output: the folder; checked like a run's `output`. Nothing is created yet.
        allowed: names of further files and folders that may be there.

    Raises:
        ConfigError: the path leads out of the working directory, or the folder holds other files.
    """

    def __init__(self, output: str | Path, allowed: tuple[str, ...] = ()) -> None:
        self.path = RunDirectory.at(output).path
        self._older = self._figures()
        ours = {RESULT, *allowed, *self._older}
        refuse_links(self.path, ours)
        if self.path.is_dir():
            foreign = sorted(
                entry.name
                for entry in self.path.iterdir()
                if entry.name not in ours and not is_lock(entry.name) and not is_leftover(entry.name)
            )
            if foreign:
                raise ConfigError(
                    f"--output: {self.path} holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}, which "
                    "are not from an analysis; nothing there was changed. Choose an empty folder."
                )

    @property
    def result(self) -> Path:
        return self.path / RESULT

    def write(self, analysis: dict[str, Any], command: str = "") -> dict[str, Any]:
        """Write the numbers, rounded to six digits, and their figures; returns the content of `analysis.json`.

        Args:
            analysis: the numbers.
            command: recorded as the command that made them.

        Raises:
            TrainingError: the folder cannot be written.
        """
        plots = []
        if importlib.util.find_spec("matplotlib") is not None:
            from braidlora.reporting.analysis_plots import analysis_plots

            plots = analysis_plots(analysis)
        figures = [{"name": plot.name, "title": plot.title, "caption": plot.caption} for plot in plots]
        content = {**as_written(analysis, command), "figures": figures}
        with explain_write_failures(self.path, "or give another --output"):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            for name in self._older:
                (self.path / name).unlink(missing_ok=True)
            atomic_write_json(self.result, content)
            for plot in plots:
                plot.save(self.path)
        return content

    def _figures(self) -> list[str]:
        """File names of the figures of the existing analysis."""
        path = self.result
        if not path.is_file():
            return []
        try:
            named = [figure["name"] for figure in loads(path.read_text(encoding="utf-8"))["figures"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output: {path} was not written by braidlora; nothing there was changed. Choose an empty folder."
            ) from None
        return [f"{Path(name).name}{suffix}" for name in named for suffix in _SUFFIXES]


def as_written(analysis: dict[str, Any], command: str) -> dict[str, Any]:
    """The content of `analysis.json`, without its figures."""
    return {
        "braidlora": __version__, "command": command, "environment": environment(), **rounded(analysis),
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """The same JSON value with every float at six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value

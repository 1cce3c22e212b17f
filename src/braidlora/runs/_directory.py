"""The layout of a run directory, and where a run may write."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from braidlora.errors import CheckpointError, ConfigError
from braidlora.paths import expanded
from braidlora.runs._commit import restore_all
from braidlora.runs._coverage import read_covered, read_covered_json
from braidlora.runs._files import is_leftover, remove_leftovers, remove_tree
from braidlora.runs._lock import is_lock
from braidlora.runs._manifest import MANIFEST
from braidlora.runs._names import DATA, ENVIRONMENT, LABELS, LOG, METRICS, PREDICTIONS, RECIPE

if TYPE_CHECKING:
    from typing_extensions import Self

State = Literal["new", "started", "resumable", "finished", "foreign"]


class Inside:
    """A file or folder of a directory, as an attribute that is its path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, directory: RunDirectory, owner: type) -> Path:
        return directory.path / self.name


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

        config.yaml  environment.json  data.json  labels.json   recipe, versions, data, labels
        adapter_init/                                           the adapter before the first step
        checkpoints/step-N/                                     everything needed to resume
        log.jsonl                                               losses, one line per log
        adapter/                                                the result, in PEFT format
        predictions/TASK.jsonl  metrics.json                    its evaluation; metrics.json is written last
        evaluations/DIGEST/                                     later evaluations with other settings
        report.html  figures/                                   all of it on one page
        manifest.json                                           sha256 of these files; checkpoints and adapters have
                                                                their own manifests

    `RunDirectory.at(output)` checks the path; the constructor does not.
    """

    path: Path

    config = Inside(RECIPE)
    environment = Inside(ENVIRONMENT)
    data = Inside(DATA)
    labels = Inside(LABELS)
    log = Inside(LOG)
    metrics = Inside(METRICS)
    adapter = Inside("adapter")
    adapter_init = Inside("adapter_init")
    checkpoints = Inside("checkpoints")
    predictions = Inside(PREDICTIONS)

    # config.yaml is written first and removed last: it marks a folder as a run directory.
    FILES: ClassVar[tuple[str, ...]] = (
        RECIPE, ENVIRONMENT, DATA, LABELS, LOG, METRICS, "report.html", MANIFEST,
    )  # fmt: skip
    FOLDERS: ClassVar[tuple[str, ...]] = (
        "adapter",
        "adapter_init",
        "checkpoints",
        PREDICTIONS,
        "evaluations",
        "figures",
    )
    STEP: ClassVar = "step"  # prefix of a checkpoint's name
    FEDERATED: ClassVar = False

    @classmethod
    def at(cls, output: str | Path) -> Self:
        """The run directory that a recipe's `output` names.

        A recipe may come from someone else, so a relative path must stay below the working directory, also after
        links are resolved; `..` is always rejected, and so is a link in place of the run directory or of a file in it.
        An absolute path is accepted as given. This creates nothing.

        Raises:
            ConfigError: the path leaves the working directory, is a link, or is not a folder.
        """
        if not str(output).strip():
            raise ConfigError("output: got an empty path; expected a folder such as runs/mine.")
        path = expanded(output)
        if ".." in path.parts:
            raise ConfigError(
                f"output: {str(output)!r} contains `..`; expected a path below the working directory, or an absolute "
                "path."
            )
        if not path.is_absolute():
            here = Path.cwd().resolve()
            real = (here / path).resolve()
            if real != here and here not in real.parents:
                raise ConfigError(
                    f"output: {str(output)!r} passes through a link to {real}, outside the working directory. To write "
                    "there, give that path."
                )
        if path.is_symlink():
            raise ConfigError(
                f"output: {str(output)!r} is a link to {path.resolve()}. To write there, give that path."
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"output: {str(output)!r} is a file; expected a folder, or a path that does not exist."
            )
        directory = cls(path)
        refuse_links(path, (*cls.FILES, *cls.FOLDERS))
        return directory

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{self.STEP}-{step}"

    def checkpoint_steps(self) -> list[int]:
        """The steps of existing checkpoints, oldest first; they may be damaged."""
        if not self.checkpoints.is_dir():
            return []
        found = (re.fullmatch(rf"{self.STEP}-(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def state(self) -> State:
        """`new` (absent or empty), `started`, `resumable` (has a checkpoint), `finished`, or `foreign` (not a run)."""
        if not self.path.is_dir():
            return "new"
        if not self.config.is_file():
            ours = (is_leftover(entry.name) or is_lock(entry.name) for entry in self.path.iterdir())
            return "new" if all(ours) else "foreign"
        if self._holds_federation() != self.FEDERATED:
            return "foreign"
        if self.metrics.is_file():
            return "finished"
        return "resumable" if self.checkpoint_steps() else "started"

    def refuse_to_lose(self, *, resume: bool, overwrite: bool) -> None:
        """Raise if training here would overwrite an earlier run or other files.

        Raises:
            CheckpointError: the directory has an earlier run, and neither resume nor overwrite is set.
            ConfigError: the directory has files that do not belong to a run.
        """
        state = self.state()
        if state == "foreign":
            raise ConfigError(
                f"output: {self.path} has files that were not written by a {self._what()}; nothing was changed. Choose "
                "an empty folder or a new path."
            )
        if resume or overwrite or state in ("new", "started"):
            return
        remedy = "shows its result" if state == "finished" else "resumes it"
        raise CheckpointError(
            f"{self.path}: already has {self.content()}. --resume auto {remedy}, --overwrite deletes it and starts "
            "over, --output=PATH writes the new run elsewhere."
        )

    def content(self) -> str:
        """What a finished or resumable directory has, for messages: `a finished run`, `a run at step 40`."""
        if self.state() == "finished":
            return f"a finished {self._what()}"
        return f"a {self._what()} at {self.STEP} {self.checkpoint_steps()[-1]}"

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what a run writes and nothing else; `config.yaml` last, because it marks a run directory.

        Args:
            keep: files that stay.
        """
        for name in reversed(self.FILES[1:]):
            if name not in keep:
                (self.path / name).unlink(missing_ok=True)
        for name in self.FOLDERS:
            remove_tree(self.path / name)
        self.remove_partial()
        self.config.unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Remove partial files and folders of a killed process."""
        remove_leftovers(self.path)
        for name in self.FOLDERS:
            remove_leftovers(self.path / name, below=True)

    def restore(self) -> None:
        """Restore folders that a killed process had set aside to replace them."""
        for folder in (self.path, self.checkpoints):
            restore_all(folder)

    def read(self, name: str) -> bytes:
        """The bytes of one of the run's files, checked against the run's manifest.

        Raises:
            CheckpointError: the file is missing or has changed.
        """
        return read_covered(self.path, name)

    def read_json(self, name: str) -> Any:
        """The content of one of the run's JSON files; raises as `read`, or CheckpointError if it is not JSON."""
        return read_covered_json(self.path, name)

    def _what(self) -> str:
        return "federation" if self.FEDERATED else "run"

    def _holds_federation(self) -> bool:
        """Whether the recipe in this directory is federated."""
        text = self.config.read_text(encoding="utf-8", errors="replace")
        return any(line.startswith("federation:") for line in text.split("\n"))


def refuse_links(directory: Path, names: Iterable[str]) -> None:
    """Raise if one of these files and folders of `directory`, or anything in them, is a link.

    Results would be written to the target of the link.

    Raises:
        ConfigError: names the link and its target.
    """
    for name in names:
        path = directory / name
        inside = (
            Path(folder) / entry for folder, folders, files in os.walk(path) for entry in (*folders, *files)
        )
        for candidate in (path, *(() if path.is_symlink() else inside)):
            if candidate.is_symlink():
                raise ConfigError(
                    f"output: {candidate} is a link to {candidate.resolve()}; a run writes only to its own directory. "
                    "Remove the link."
                )

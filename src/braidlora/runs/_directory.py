"""Where everything of a run stands, and which places a run may write to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
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


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

        config.yaml  environment.json  data.json  labels.json   what was run, on what
        adapter_init/                                           the adapter before the first step
        checkpoints/step-N/                                     everything a resume needs
        log.jsonl                                               losses, one line per log
        adapter/                                                the result, in PEFT format
        predictions/TASK.jsonl  metrics.json                    its evaluation; metrics.json is written last
        evaluations/DIGEST/                                     later evaluations with other settings
        manifest.json                                           sha256 of these files; checkpoints and adapters have
                                                                manifests of their own

    `RunDirectory.at(output)` checks the path first; the plain constructor trusts it.
    """

    path: Path

    # config.yaml is written first and removed last: it is what makes a folder a run directory.
    FILES: ClassVar[tuple[str, ...]] = (
        RECIPE,
        ENVIRONMENT,
        DATA,
        LABELS,
        LOG,
        METRICS,
        MANIFEST,
    )
    FOLDERS: ClassVar[tuple[str, ...]] = (
        "adapter",
        "adapter_init",
        "checkpoints",
        PREDICTIONS,
        "evaluations",
    )
    STEP: ClassVar = "step"  # what a checkpoint is named after
    FEDERATED: ClassVar = False

    @classmethod
    def at(cls, output: str | Path) -> Self:
        """The run directory that a recipe's `output` names.

        A recipe may come from somebody else, so a relative path has to stay below the working directory, also after
        its links are resolved; `..` is refused everywhere, and so are links in place of the run directory or of the
        files in it. An absolute path is taken at its word. Nothing is created here.

        Raises:
            ConfigError: the path leads out, is a link, or is no folder.
        """
        if not str(output).strip():
            raise ConfigError("output: is empty; expected a folder, e.g. runs/mine.")
        path = expanded(output)
        if ".." in path.parts:
            raise ConfigError(
                f"output: {str(output)!r} contains `..`; expected a path below the working directory, or an absolute "
                "path if the run shall stand elsewhere."
            )
        if not path.is_absolute():
            here = Path.cwd().resolve()
            real = (here / path).resolve()
            if real != here and here not in real.parents:
                raise ConfigError(
                    f"output: {str(output)!r} leads through a link to {real}, outside the working directory. "
                    "Give that path itself if it is meant."
                )
        if path.is_symlink():
            raise ConfigError(
                f"output: {str(output)!r} is a link to {path.resolve()}. Give that path itself if it is meant."
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"output: {str(output)!r} is a file; expected a folder, or a path that is free."
            )
        directory = cls(path)
        directory._refuse_links()
        return directory

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_init(self) -> Path:
        return self.path / "adapter_init"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        return self.path / PREDICTIONS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def config(self) -> Path:
        return self.path / RECIPE

    @property
    def environment(self) -> Path:
        return self.path / ENVIRONMENT

    @property
    def data(self) -> Path:
        return self.path / DATA

    @property
    def labels(self) -> Path:
        return self.path / LABELS

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{self.STEP}-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first; whether they are intact is another question."""
        if not self.checkpoints.is_dir():
            return []
        found = (re.fullmatch(rf"{self.STEP}-(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def state(self) -> State:
        """`new` (absent or empty), `started`, `resumable` (it has a checkpoint), `finished`, or `foreign`: not ours."""
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
        """Raise unless training may write here without losing an earlier run or somebody's files.

        Raises:
            CheckpointError: an earlier run stands here, and neither resume nor overwrite was asked for.
            ConfigError: the folder holds files that are not a run's.
        """
        state = self.state()
        if state == "foreign":
            raise ConfigError(
                f"output: {self.path} holds files that no {self._what()} wrote; nothing there is touched. Choose a "
                "free folder."
            )
        if resume or overwrite or state in ("new", "started"):
            return
        what = f"a {self._what()} at {self.STEP} {self.checkpoint_steps()[-1]}"
        if state == "finished":
            what = f"a finished {self._what()}"
        remedy = "shows its result" if state == "finished" else "carries on with it"
        raise CheckpointError(
            f"{self.path}: holds {what}. --resume auto {remedy}, --overwrite starts over and loses it, "
            "--output=PATH puts the new run elsewhere."
        )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else; `config.yaml` last, since it says that the folder is a run's."""
        for name in reversed(self.FILES[1:]):
            (self.path / name).unlink(missing_ok=True)
        for name in self.FOLDERS:
            remove_tree(self.path / name)
        self.remove_partial()
        self.config.unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Remove what a killed process left half written."""
        remove_leftovers(self.path)
        for name in self.FOLDERS:
            remove_leftovers(self.path / name, below=True)

    def restore(self) -> None:
        """Put back folders that a killed process had set aside to replace them."""
        for folder in (self.path, self.checkpoints):
            restore_all(folder)

    def read(self, name: str) -> bytes:
        """The bytes of one of the run's files, checked against the run's manifest.

        Raises:
            CheckpointError: it is missing or has changed since it was written.
        """
        return read_covered(self.path, name)

    def read_json(self, name: str) -> Any:
        """The content of one of the run's JSON files; raises as `read`, and where it is no JSON."""
        return read_covered_json(self.path, name)

    def _what(self) -> str:
        return "federation" if self.FEDERATED else "run"

    def _holds_federation(self) -> bool:
        """Whether the recipe that stands here is a federated one."""
        text = self.config.read_text(encoding="utf-8", errors="replace")
        return any(line.startswith("federation:") for line in text.split("\n"))

    def _refuse_links(self) -> None:
        refuse_links(self.path, (*self.FILES, *self.FOLDERS))


def refuse_links(directory: Path, names: Iterable[str]) -> None:
    """Raise where one of these files and folders of `directory`, or anything inside them, is a link.

    A link would have the results written wherever it leads.

    Raises:
        ConfigError: with the link and where it leads.
    """
    for name in names:
        path = directory / name
        inside = (
            Path(folder) / entry for folder, folders, files in os.walk(path) for entry in (*folders, *files)
        )
        for candidate in (path, *(() if path.is_symlink() else inside)):
            if candidate.is_symlink():
                raise ConfigError(
                    f"output: {candidate} is a link to {candidate.resolve()}; a run writes only into its own "
                    "directory. Remove the link."
                )

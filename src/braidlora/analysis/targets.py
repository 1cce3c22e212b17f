"""The targets of `braidlora analyze`: adapter folders, run directories, federations, and adapters inside a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from braidlora.analysis.factors import AdapterFile
from braidlora.errors import CheckpointError, ConfigError
from braidlora.paths import expanded
from braidlora.runs import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RECIPE,
    FederatedDirectory,
    RunDirectory,
    run_around,
)

_ELSEWHERE = ("cells/*", "runs/*", "adapter")  # of a comparison, of a study, of a run that was copied in part


@dataclass(frozen=True)
class Target:
    """One adapter to analyze.

    Attributes:
        label: its name in results: the shortest end of its path that is unique.
        path: as given.
        folder: the adapter's folder.
        run: the run that was given, or that contains it.
        whole_run: whether the run itself was given.
        federation: label and directory of the federation that was given and that it is a client of.
    """

    label: str
    path: Path
    folder: Path
    run: RunDirectory | None
    whole_run: bool
    federation: tuple[str, FederatedDirectory] | None = None

    def open(self) -> AdapterFile:
        return AdapterFile(self.folder, self.label)


def find_targets(paths: Sequence[str | Path]) -> list[Target]:
    """The targets behind `paths`, each with a unique label; a federation gives one per client.

    Raises:
        ConfigError: a path is given twice.
        CheckpointError: a path is not a folder, neither an adapter nor a run, or has no adapter yet.
    """
    given = [expanded(path) for path in paths]
    for at, path in enumerate(given):
        if path.resolve() in [other.resolve() for other in given[:at]]:
            raise ConfigError(f"{path}: given twice; give every adapter once.")
    labels = _labels(given)
    found = [target for path, label in zip(given, labels, strict=True) for target in _targets(path, label)]
    if len(given) == 1:  # no other federation to distinguish its clients from
        found = [replace(one, label=one.label.removeprefix(f"{labels[0]}/")) for one in found]
    return found


def _targets(path: Path, label: str) -> list[Target]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected an adapter or a run directory.")
    run = run_around(path)
    if run is None and not _has_adapter_files(path):
        where = next((found for pattern in _ELSEWHERE for found in sorted(path.glob(pattern))), None)
        raise CheckpointError(
            f"{path}: neither an adapter ({ADAPTER_CONFIG}, {ADAPTER_WEIGHTS}) nor a run directory ({RECIPE})."
            + (f" Its adapters are in subfolders: {where}." if where else "")
        )
    if run is None or run.path != path.resolve():
        return [Target(label, path, path, run, whole_run=False)]
    federation = FederatedDirectory.at(path.resolve())
    if federation.state() != "foreign":
        return _clients(federation, path, label)
    if not run.adapter.is_dir():
        raise CheckpointError(
            f"{path}: this run has no adapter yet; it did not finish. Resume it with `braidlora train RECIPE --resume "
            "auto`, or give one of its checkpoints: checkpoints/step-N."
        )
    return [Target(label, path, path / run.adapter.name, run, whole_run=True)]


def _clients(federation: FederatedDirectory, path: Path, label: str) -> list[Target]:
    """The adapters of a federation's clients, including those added later."""
    if federation.state() != "finished":
        raise CheckpointError(
            f"{path}: this federation is not finished; its clients' adapters are missing or outdated. Resume it with "
            "`braidlora federate RECIPE --resume auto`."
        )
    return [
        Target(
            f"{label}/{name}",
            path / "clients" / name / "adapter",
            path / "clients" / name / "adapter",
            None,
            whole_run=False,
            federation=(label, federation),
        )
        for name in federation.client_adapters()
    ]


def _has_adapter_files(path: Path) -> bool:
    """Whether this is an adapter, complete or not."""
    return (path / ADAPTER_CONFIG).is_file() or any(path.glob("adapter_model*"))


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest unique ends of the paths; `adapter` or `step-N` alone would say little."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        vague = any(label in ("adapter", "adapter_init") or label.startswith("step-") for label in labels)
        if len(set(labels)) == len(labels) and not (vague and length == 1 and len(labels) > 1):
            return labels
    raise AssertionError("different paths have different ends")

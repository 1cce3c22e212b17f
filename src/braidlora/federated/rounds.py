"""Rounds on disk: committed whole, read back verified, the last two kept."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from braidlora.errors import CheckpointError
from braidlora.federated.wire import pack, read_file
from braidlora.runs import (
    MANIFEST,
    FederatedDirectory,
    IncompleteError,
    atomic_write_json,
    read_json,
    read_lines,
    remove_tree,
    verify_manifest,
)

_KEPT = 2
SHARED, SERVER, LOG, CLIENTS = "shared.safetensors", "server.json", "rounds.jsonl", "clients"


@dataclass(frozen=True)
class Committed:
    """A round as it stands on disk.

    Args:
        round: its number.
        folder: where it stands.
        shared: the shared state after it.
        server: `{"experiment", "round", "since", "counted", "scores", "seconds"}`.
        log: the lines of rounds.jsonl up to it.
    """

    round: int
    folder: Path
    shared: dict[str, Tensor]
    server: dict[str, Any]
    log: list[str]


def newest_round(directory: FederatedDirectory, experiment: str) -> Committed | None:
    """The last round that was written completely; those passed over are warned of. None where there is none.

    Raises:
        CheckpointError: a round is damaged or belongs to another experiment, or none is complete.
    """
    incomplete: list[str] = []
    for number in reversed(directory.checkpoint_steps()):
        folder = directory.checkpoint(number)
        try:
            files = verify_manifest(folder)
        except IncompleteError as error:
            incomplete.append(str(error))
            continue
        server = read_json(folder / SERVER)
        if server["experiment"] != experiment:
            raise CheckpointError(
                f"{folder}: a round of experiment {server['experiment']}; this is {experiment}. It was put here from "
                "another federation; remove it, or start over with --overwrite."
            )
        for problem in incomplete:
            warnings.warn(
                f"passed over an incomplete round, resuming after round {number}: {problem}", stacklevel=2
            )
        shared = read_file(folder / SHARED)[0] if SHARED in files else {}
        log = read_lines(folder / LOG)
        return Committed(number, folder, shared, server, log)
    if incomplete:
        raise CheckpointError(
            f"{directory.checkpoints}: no round is complete. {incomplete[0]} --overwrite starts over."
        )
    return None


def write_round(
    staging: Path, before: Path | None, shared: dict[str, Tensor], server: dict[str, Any], log: list[str]
) -> dict[str, Any]:
    """Fill a staging folder, which already has the states of the clients that took part, with all else of a round.

    Returns:
        for `commit_directory`, what the manifest of the round before says of the states that are linked.
    """
    linked = {}
    if shared:
        (staging / SHARED).write_bytes(pack(shared))
    if before is not None:
        manifest = read_json(before / MANIFEST)["files"]
        for path in sorted((before / CLIENTS).iterdir()):
            if not (staging / CLIENTS / path.name).exists():
                name = f"{CLIENTS}/{path.name}"
                if _link(path, staging / name) and name in manifest:
                    linked[name] = manifest[name]
    atomic_write_json(staging / SERVER, server)
    (staging / LOG).write_text("".join(line + "\n" for line in log), encoding="utf-8")
    return linked


def prune(directory: FederatedDirectory, newest: int) -> None:
    """Remove rounds beyond the last two."""
    for number in directory.checkpoint_steps():
        if number <= newest - _KEPT:
            remove_tree(directory.checkpoint(number))


def _link(source: Path, target: Path) -> bool:
    """The same file under a second name: a state that has not changed takes no room again. False: it was copied."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        return False
    return True

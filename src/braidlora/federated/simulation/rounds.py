"""Rounds on disk: committed whole, read back verified, the last few kept. Only what a manifest lists counts."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from braidlora import runs
from braidlora.errors import CheckpointError
from braidlora.federated.protocol.wire import pack, parse
from braidlora.federated.site.state import SavedState
from braidlora.runs import (
    FederatedDirectory,
    IncompleteError,
    atomic_write_json,
    remove_tree,
    split_lines,
    temporary_name,
)

SHARED, SERVER, LOG, CLIENTS = "shared.safetensors", "server.json", "rounds.jsonl", "clients"


@dataclass(frozen=True)
class Committed:
    """A round as it stands on disk.

    Args:
        round: its number.
        folder: where it stands.
        files: what its manifest lists, by relative path: `{"bytes", "sha256"}`. Nothing else in the folder counts.
        shared: the shared state after it.
        server: `{"experiment", "round", "since", "counted", "clients", "settings", "scores", "seconds"}`.
        log: the lines of rounds.jsonl up to it.
    """

    round: int
    folder: Path
    files: dict[str, dict[str, Any]]
    shared: dict[str, Tensor]
    server: dict[str, Any]
    log: list[str]

    def state(self, client: str) -> SavedState | None:
        """A client's state after this round; None where it has none yet."""
        listed = self.files.get(state_file(client))
        return None if listed is None else SavedState(self.folder / state_file(client), listed["sha256"])


def state_file(client: str) -> str:
    """Where a client's state stands in a round's folder."""
    return f"{CLIENTS}/{client}.safetensors"


def read_round(directory: FederatedDirectory, number: int, experiment: str) -> Committed:
    """A round, every file of it checked against the manifest.

    Raises:
        IncompleteError: it was not written to its end.
        CheckpointError: it is damaged, or of another experiment, or another round under this name.
    """
    folder = directory.checkpoint(number)
    found = runs.Committed(folder)
    files = found.verify()
    if missing := [name for name in (SERVER, LOG) if name not in files]:
        raise CheckpointError(
            f"{folder}: no round of a federation; its manifest lists no {' and no '.join(missing)}."
        )
    server = found.read_json(SERVER)
    if server["experiment"] != experiment:
        raise CheckpointError(
            f"{folder}: a round of experiment {server['experiment']}; this is {experiment}. It was put here from "
            "another federation; remove it, or start over with --overwrite."
        )
    if server["round"] != number:
        raise CheckpointError(
            f"{folder}: holds round {server['round']} under the name of another; remove this folder."
        )
    shared = parse(folder / SHARED, found.read(SHARED))[0] if SHARED in files else {}
    log = split_lines(found.read(LOG).decode("utf-8"))
    return Committed(number, folder, files, shared, server, log)


def newest_round(directory: FederatedDirectory, experiment: str) -> Committed | None:
    """The last round that was written completely; those passed over or gone are warned of. None where there is none.

    Raises:
        CheckpointError: a round is damaged or belongs to another experiment, or none is complete. The message says
            which earlier round is intact, and how to go on from it.
    """
    passed_over: list[str] = []
    numbers = directory.checkpoint_steps()
    while numbers:
        number = numbers.pop()
        try:
            committed = read_round(directory, number, experiment)
        except IncompleteError as error:
            passed_over.append(str(error))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_way_on(directory, numbers, experiment)}") from None
        for problem in passed_over:
            warnings.warn(
                f"passed over an incomplete round, resuming after round {number}: {problem}", stacklevel=2
            )
        done = logged_rounds(directory)
        if done > number and not passed_over:
            warnings.warn(
                f"{directory.checkpoint(done)} is gone, though {directory.log} has {done} rounds; resuming after round "
                f"{number}, and the rounds after it are run again",
                stacklevel=2,
            )
        return committed
    if passed_over:
        raise CheckpointError(
            f"{directory.checkpoints}: no round is complete. {passed_over[0]} --overwrite starts over."
        )
    return None


def logged_rounds(directory: FederatedDirectory) -> int:
    """How many rounds the log beside the rounds has; it is written after a round is committed."""
    try:
        return directory.log.read_bytes().count(b"\n")
    except OSError:
        return 0


def _way_on(directory: FederatedDirectory, numbers: list[int], experiment: str) -> str:
    """What a message says of the rounds before a damaged one."""
    for number in reversed(numbers):
        try:
            read_round(directory, number, experiment)
        except CheckpointError:
            continue
        return (
            f"Round {number} is intact: `braidlora federate RECIPE --rollback {number} --resume auto` goes on from "
            "there and runs the rounds after it again."
        )
    return "No earlier round is intact here; --overwrite starts over."


def write_round(
    staging: Path,
    before: Committed | None,
    kept: Collection[str],
    shared: dict[str, Tensor],
    server: dict[str, Any],
    log: list[str],
) -> dict[str, Any]:
    """Fill a staging folder, which already has the states of the clients that took part, with all else of a round.

    Args:
        before: the last round, whose states of all other clients stay as they are.
        kept: clients whose new state is in `staging`. Whatever else stands there is removed, so that the manifest
            lists only what this federation wrote.

    Returns:
        for `commit_directory`, what the manifest of the round before says of the states that are linked.

    Raises:
        CheckpointError: a state of the round before is gone or has changed.
    """
    linked: dict[str, Any] = {}
    written = {state_file(name) for name in kept}
    if shared:
        (staging / SHARED).write_bytes(pack(shared))
        written.add(SHARED)
    if before is not None:
        for name, listed in before.files.items():
            if name.startswith(f"{CLIENTS}/") and name not in written:
                if _link(before.folder / name, staging / name, listed["sha256"]):
                    linked[name] = listed
                written.add(name)
    atomic_write_json(staging / SERVER, server)
    (staging / LOG).write_text("".join(line + "\n" for line in log), encoding="utf-8", newline="\n")
    written |= {SERVER, LOG}
    for path in [path for path in staging.rglob("*") if not path.is_dir() or path.is_symlink()]:
        if path.relative_to(staging).as_posix() not in written:
            path.unlink()
    return linked


def committed_round(
    target: Path, number: int, shared: dict[str, Tensor], server: dict[str, Any], log: list[str]
) -> Committed:
    """The round that has just been committed at `target`."""
    return Committed(number, target, runs.Committed(target).files or {}, shared, server, log)


def prune(directory: FederatedDirectory, newest: int, keep: int) -> None:
    """Remove rounds beyond the last `keep`, those that a kill has left as well."""
    for number in directory.checkpoint_steps():
        if number <= newest - keep:
            remove_round(directory, number)


def remove_round(directory: FederatedDirectory, number: int) -> None:
    """Remove a round: it is gone at once, and what a kill leaves of it is swept up at the next start."""
    folder = directory.checkpoint(number)
    aside = temporary_name(folder)
    os.replace(folder, aside)
    remove_tree(aside)


def _link(source: Path, target: Path, sha256: str) -> bool:
    """The same file under a second name: a state that has not changed takes no room again. False: it was copied."""
    if source.is_symlink() or not source.is_file():
        raise CheckpointError(f"{source}: gone since the round was committed; a manifest lists it.")
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        if hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
            raise CheckpointError(f"{source}: changed since the round was committed.") from None
        return False
    return True

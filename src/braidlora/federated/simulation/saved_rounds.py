"""Rounds on disk: committed as a unit, verified when read, the last few kept. Only what a manifest lists counts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora import runs
from braidlora.errors import CheckpointError
from braidlora.federated.protocol.outliers import Typical
from braidlora.federated.protocol.state import ClientState, ServerState
from braidlora.federated.protocol.wire import pack, parse
from braidlora.federated.simulation.early_layout import early_states
from braidlora.federated.site.store import FOLDER, ClientStore, read_state
from braidlora.runs import FederatedDirectory, IncompleteError, atomic_write_json, remove_at_once, split_lines

SHARED, SERVER, LOG = "shared.safetensors", "server.json", "rounds.jsonl"
VELOCITY = "velocity.safetensors"  # of federation.server_momentum


@dataclass(frozen=True)
class SavedRound:
    """A committed round.

    Args:
        round: its number.
        state: the server's state after it.
        record: server.json: `{"experiment", "round", "since", "counted", "clients", "settings", "typical", "weights",
            "scores", "seconds"}`, where `since` is the round that the shared state comes from, and `"remote": true` if
            the clients' states are at their sites.
        log: the lines of rounds.jsonl up to it.
    """

    round: int
    state: ServerState
    record: dict[str, Any]
    log: list[str]


def read_round(directory: FederatedDirectory, number: int, experiment: str) -> SavedRound:
    """A round; its files and the states that its clients keep for it are verified.

    Raises:
        IncompleteError: it was not completely written, or a client's state is missing or was truncated.
        CheckpointError: it or a client's state is damaged, or it is another experiment's or round's.
    """
    folder = directory.checkpoint(number)
    found = runs.Committed(folder)
    files = found.verify()
    if missing := [name for name in (SERVER, LOG) if name not in files]:
        raise CheckpointError(
            f"{folder}: not a round of a federation; its manifest does not list {' and '.join(missing)}."
        )
    record = found.read_json(SERVER)
    if record["experiment"] != experiment:
        raise CheckpointError(
            f"{folder}: a round of experiment {record['experiment']}; this is {experiment}. It was put here from "
            "another federation; remove it, or start over with --overwrite."
        )
    if record["round"] != number:
        raise CheckpointError(
            f"{folder}: contains round {record['round']} under the name of another; remove this folder."
        )
    if not early_states(files):
        # States of clients that have left may be gone, and those of sites were never here.
        present = [] if record.get("remote") else record["clients"]
        for client in sorted(record["counted"].keys() & set(present)):
            ClientStore(directory.client(client), client).read(record["counted"][client])
    state = ServerState(
        experiment=experiment,
        shared=parse(found.read(SHARED), str(folder / SHARED))[0] if SHARED in files else {},
        shared_round=record["since"],
        counted=record["counted"],
        typical=Typical(**record["typical"]) if record.get("typical") else None,
        weights=record.get("weights", {}),
        velocity=parse(found.read(VELOCITY), str(folder / VELOCITY))[0] if VELOCITY in files else {},
    )
    log = split_lines(found.read(LOG).decode("utf-8"))
    return SavedRound(number, state, record, log)


def client_state(directory: FederatedDirectory, saved: SavedRound, client: str) -> ClientState | None:
    """A client's state after a round; None if none of its updates had counted. Nothing is changed.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    folder = directory.checkpoint(saved.round)
    committed = runs.Committed(folder)
    early, experiment = early_states(committed.files or {}), saved.state.experiment
    if client in early:
        return read_state(committed.read(early[client]), folder / early[client], client, experiment)
    if client not in saved.state.counted:
        return None
    return ClientStore(directory.client(client), client).load(saved.state.counted[client], experiment)


def roll_back_clients(directory: FederatedDirectory, state: ServerState) -> None:
    """Remove clients' states of rounds that the server does not have, as a kill or a rollback leaves them."""
    for folder in directory.clients.iterdir() if directory.clients.is_dir() else []:
        if (folder / FOLDER).is_dir() and not folder.is_symlink():
            ClientStore(folder, folder.name).roll_back(state.counted.get(folder.name, 0))


def newest_round(directory: FederatedDirectory, experiment: str) -> SavedRound | None:
    """The last round that was completely written, with warnings of incomplete and missing ones; None if there is none.

    Raises:
        CheckpointError: a round is damaged or belongs to another experiment, or none is complete. The message names
            the last intact round, and how to resume from it.
    """
    incomplete: list[str] = []
    numbers = directory.checkpoint_steps()
    while numbers:
        number = numbers.pop()
        try:
            saved = read_round(directory, number, experiment)
        except IncompleteError as error:
            incomplete.append(str(error))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_remedy(directory, numbers, experiment)}") from None
        for problem in incomplete:
            warnings.warn(
                f"skipped an incomplete round, resuming after round {number}: {problem}", stacklevel=2
            )
        done = logged_rounds(directory)
        if done > number and not incomplete:
            warnings.warn(
                f"{directory.checkpoint(done)} is missing, although {directory.log} has {done} rounds; resuming "
                f"after round {number}, and the rounds after it are run again",
                stacklevel=2,
            )
        return saved
    if incomplete:
        raise CheckpointError(
            f"{directory.checkpoints}: no round is complete. {incomplete[0]} --overwrite starts over."
        )
    return None


def logged_rounds(directory: FederatedDirectory) -> int:
    """How many rounds the federation's log has; it is written after a round is committed."""
    try:
        return directory.log.read_bytes().count(b"\n")
    except OSError:
        return 0


def _remedy(directory: FederatedDirectory, numbers: list[int], experiment: str) -> str:
    """What a message about a damaged round says of those before it."""
    for number in reversed(numbers):
        try:
            read_round(directory, number, experiment)
        except CheckpointError:
            continue
        return (
            f"Round {number} is intact: `braidlora federate RECIPE --rollback {number} --resume auto` resumes from "
            "there and runs the rounds after it again."
        )
    return "No earlier round is intact here; --overwrite starts over."


def write_round(staging: Path, state: ServerState, record: dict[str, Any], log: list[str]) -> None:
    """Write a round into a staging folder, and remove from it what does not belong there."""
    written = {SERVER, LOG}
    for name, tensors in ((SHARED, state.shared), (VELOCITY, state.velocity)):
        if tensors:
            (staging / name).write_bytes(pack(tensors))
            written.add(name)
    atomic_write_json(staging / SERVER, record)
    (staging / LOG).write_text("".join(line + "\n" for line in log), encoding="utf-8", newline="\n")
    for path in [path for path in staging.rglob("*") if not path.is_dir() or path.is_symlink()]:
        if path.relative_to(staging).as_posix() not in written:
            path.unlink()


def prune(directory: FederatedDirectory, newest: int, keep: int) -> None:
    """Remove rounds beyond the last `keep`, including those that a kill left."""
    for number in directory.checkpoint_steps():
        if number <= newest - keep:
            remove_at_once(directory.checkpoint(number))

"""The round that a federation resumes from. Nothing is changed before it is certain that it is the same federation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from braidlora.errors import CheckpointError, ConfigError
from braidlora.federated.simulation.resume import changes, resumed_identity
from braidlora.federated.simulation.rollback import rollback as roll_back
from braidlora.federated.simulation.rounds import Rounds
from braidlora.federated.simulation.saved_rounds import SavedRound, logged_rounds, newest_round
from braidlora.runs import FederatedDirectory, remove_at_once


@dataclass(frozen=True)
class Start:
    """What a federation starts from.

    Args:
        last: the last round; None if all rounds are to be run.
        experiment: the federation's id, which clients' states carry.
        identity: what a resume must find unchanged, including clients that have left.
        changes: what has changed since that round.
    """

    last: SavedRound | None
    experiment: str
    identity: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


def resume_from(rounds: Rounds, new: Start, rollback: int | None) -> Start:
    """The round to resume from; `new` if no round was ever committed.

    Args:
        rounds: those of the recipe, before any.
        new: the start of a new federation by this recipe.
        rollback: first go back to this round.

    Raises:
        CheckpointError: it is another federation, its rounds are damaged or gone, or it has more than the recipe.
        ConfigError: a client has the name of one that was added to the finished federation.
    """
    directory, clients = rounds.directory, rounds.clients
    if not directory.checkpoint_steps():
        _refuse_if_rounds_are_gone(directory)
        return new
    experiment, identity = resumed_identity(directory, new.identity, rounds.sampled)
    if added := [name for name in clients.by_name if (directory.client(name) / "added.json").is_file()]:
        raise ConfigError(
            f"{directory.path}: {', '.join(added)} was added with `federate add-client`, and already has an "
            "adapter there. Rename the client that joins, or remove that folder."
        )
    if rollback is not None:
        roll_back(directory, rollback)
    last, total = newest_round(directory, experiment), rounds.config.federation.rounds
    assert last is not None
    if last.round > total:
        raise CheckpointError(
            f"{directory.path}: has {last.round} rounds already, and federation.rounds is {total}. Give at least "
            "as many, go back to an earlier round with --rollback, or start over with --overwrite."
        )
    if last.round == total and last.state.shared_round == 0:
        warnings.warn(
            f"{directory.path}: none of its {last.round} rounds counted, so all are run again", stacklevel=2
        )
        directory.log.unlink(missing_ok=True)  # first: a log without rounds would say that they are gone
        for number in reversed(directory.checkpoint_steps()):
            remove_at_once(directory.checkpoint(number))
        return Start(None, experiment, identity)
    found = changes(last.record, clients, rounds.settings)
    if found:
        warnings.warn(
            f"{directory.path}: resuming after round {last.round} with changes, noted in {directory.log.name}: "
            + _in_words(found),
            stacklevel=2,
        )
    return Start(last, experiment, identity, found)


def _refuse_if_rounds_are_gone(directory: FederatedDirectory) -> None:
    finished, logged = directory.state() == "finished", logged_rounds(directory)
    if finished or logged:
        raise CheckpointError(
            f"{directory.path}: a {'finished ' if finished else ''}federation whose rounds are missing, so there is "
            f"nothing to resume from, though {directory.log.name} has {logged}. {directory.metrics.name} and the "
            "clients' adapters, where there are any, are untouched; --overwrite starts over and deletes them."
        )


def _in_words(changes: Mapping[str, Any]) -> str:
    found = [f"{key}: {', '.join(changes[key])}" for key in ("joined", "left") if key in changes]
    found += [
        f"{key}: {one['then']} then, {one['now']} now" for key, one in changes.get("settings", {}).items()
    ]
    return "; ".join(found)

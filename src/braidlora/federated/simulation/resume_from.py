"""Where a federation that is resumed goes on: checked to be the same one before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError, ConfigError
from braidlora.federated.simulation.resume import changes, resumed_identity
from braidlora.federated.simulation.rollback import rollback as roll_back
from braidlora.federated.simulation.rounds import Committed, logged_rounds, newest_round, remove_round
from braidlora.federated.site.clients import Clients
from braidlora.runs import FederatedDirectory


@dataclass(frozen=True)
class Resumed:
    """What a federation goes on with.

    Args:
        committed: the last round; None where all are to be run again.
        experiment: its id, which clients' states carry.
        identity: what a resume must find again, clients that have left included.
        changes: what is other than in that round.
    """

    committed: Committed | None
    experiment: str
    identity: dict[str, Any]
    changes: dict[str, Any]


def resume_from(
    directory: FederatedDirectory,
    config: FederatedConfig,
    clients: Clients,
    identity: dict[str, Any],
    sampled: str,
    settings: Mapping[str, Any],
    rollback: int | None,
) -> Resumed | None:
    """The round to go on from; None where no round was ever committed.

    Args:
        identity, settings: of this recipe, as `braidlora.federated.simulation.resume` gives them.
        sampled: `sampled_fingerprint` of the base, for federations of braidlora 0.1.
        rollback: first go back to this round.

    Raises:
        CheckpointError: it is another federation, its rounds are damaged or gone, or it has more than are wanted.
        ConfigError: a client has the name of one that was added to the finished federation.
    """
    if not directory.checkpoint_steps():
        _refuse_if_rounds_are_gone(directory)
        return None
    experiment, identity = resumed_identity(directory, identity, sampled)
    if added := [name for name in clients.by_name if (directory.client(name) / "added.json").is_file()]:
        raise ConfigError(
            f"{directory.path}: {', '.join(added)} was added with `federate add-client`, and has an adapter of its "
            "own there. Give the client that joins another name, or remove that folder."
        )
    if rollback is not None:
        roll_back(directory, rollback)
    committed, rounds = newest_round(directory, experiment), config.federation.rounds
    assert committed is not None
    if committed.round > rounds:
        raise CheckpointError(
            f"{directory.path}: has {committed.round} rounds already, and federation.rounds is {rounds}. Give at least "
            "as many, go back to an earlier round with --rollback, or start over with --overwrite."
        )
    if committed.round == rounds and committed.server["since"] == 0:
        warnings.warn(
            f"{directory.path}: none of its {committed.round} rounds counted, so all are run again",
            stacklevel=2,
        )
        for number in reversed(directory.checkpoint_steps()):
            remove_round(directory, number)
        return Resumed(None, experiment, identity, {})
    found = changes(committed.server, clients, settings)
    if found:
        warnings.warn(
            f"{directory.path}: resuming after round {committed.round} with changes, noted in {directory.log.name}: "
            + _in_words(found),
            stacklevel=2,
        )
    return Resumed(committed, experiment, identity, found)


def _refuse_if_rounds_are_gone(directory: FederatedDirectory) -> None:
    finished, logged = directory.state() == "finished", logged_rounds(directory)
    if finished or logged:
        raise CheckpointError(
            f"{directory.path}: a {'finished ' if finished else ''}federation whose rounds are gone, so there is "
            f"nothing to resume from, though {directory.log.name} has {logged}. {directory.metrics.name} and the "
            "clients' adapters, where there are any, are untouched; --overwrite starts over and loses them."
        )


def _in_words(changes: Mapping[str, Any]) -> str:
    found = [f"{key}: {', '.join(changes[key])}" for key in ("joined", "left") if key in changes]
    found += [
        f"{key}: {one['then']} then, {one['now']} now" for key, one in changes.get("settings", {}).items()
    ]
    return "; ".join(found)

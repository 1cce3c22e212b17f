"""Going back to an earlier round of a federation."""

from __future__ import annotations

import warnings

from braidlora.errors import CheckpointError, ConfigError
from braidlora.federated.simulation.saved_rounds import read_round, roll_back_clients
from braidlora.runs import (
    FederatedDirectory,
    atomic_write_json,
    atomic_write_text,
    hold,
    remove_at_once,
    remove_tree,
    uncover,
)


def rollback(directory: FederatedDirectory, round: int) -> list[int]:
    """Remove all rounds after `round`, and what was made from them: metrics, report, adapters of the clients.

    Returns the rounds that were removed, the newest first.

    Shared state and clients' states are then those of that round; sites follow when they next take part. A federation
    that is resumed with the same recipe computes what was removed again, to the byte, except for the noise and sampling
    of `federation.privacy`.

    A kill at any moment leaves a federation at that round or at a later one; the same call then completes the rollback.
    Adapters of clients that were added with `add-client` stay, though what they received may be gone.

    Raises:
        CheckpointError: there is no such round, or it is not intact; nothing is changed.
        ConfigError: the directory is not a federation's.
    """
    if directory.state() in ("new", "foreign"):
        raise ConfigError(f"--rollback {round}: {directory.path} is not a federation's directory.")
    with hold(directory.path):
        directory.restore()
        kept = directory.checkpoint_steps()
        if round not in kept:
            there = ", ".join(map(str, kept)) or "none"
            raise CheckpointError(
                f"--rollback {round}: {directory.checkpoints} has no such round; there are {there}. "
                "federation.keep_rounds says how many are kept; --overwrite starts over."
            )
        saved = read_round(directory, round, directory.read_json(directory.experiment.name)["id"])
        later = [number for number in reversed(kept) if number > round]
        folders = sorted(directory.clients.iterdir()) if directory.clients.is_dir() else []
        added = [folder.name for folder in folders if directory.was_added(folder.name)]
        own = [folder for folder in folders if folder.name not in added and not folder.is_symlink()]
        if saved.record.get("remote"):
            # Before anything is removed: a site only ever goes back to the round that the server then counts.
            members = directory.read_json(directory.experiment.name)["clients"]
            atomic_write_json(directory.rolled_back, {"round": round, "clients": sorted(members)})
        if later:
            # First the result and its entries, then the log, which must not be ahead of the rounds.
            made = [f"clients/{folder.name}/" for folder in own]
            for name in (directory.metrics.name, directory.log.name, *made):
                uncover(directory.path, name)
            directory.metrics.unlink(missing_ok=True)
            (directory.path / "report.html").unlink(missing_ok=True)
            remove_tree(directory.figures)
            for folder in own:
                remove_tree(folder / "adapter")
                remove_tree(folder / "predictions")
            atomic_write_text(directory.log, "".join(line + "\n" for line in saved.log))
            for number in later:  # the newest first: what is left is always a federation at some round
                remove_at_once(directory.checkpoint(number))
        # After the rounds that need the later states, and again if a kill came in between.
        roll_back_clients(directory, saved.state)
        if later and added:
            warnings.warn(
                f"{', '.join(added)} joined with add-client: their adapters are kept, with the shared state from "
                "before the rollback",
                stacklevel=2,
            )
    return later


def sites_behind(directory: FederatedDirectory) -> set[str]:
    """Clients whose sites have not yet followed a rollback; a site may be away for several runs.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not directory.rolled_back.is_file():
        return set()
    return set(directory.read_json(directory.rolled_back.name)["clients"])


def site_followed(directory: FederatedDirectory, client: str) -> None:
    """Note that a client's site has followed."""
    found = directory.read_json(directory.rolled_back.name)
    found["clients"].remove(client)
    if found["clients"]:
        atomic_write_json(directory.rolled_back, found)
    else:
        directory.rolled_back.unlink()

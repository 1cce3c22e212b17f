"""A client's own states on disk: committed ones, and a pending one until its round's outcome is known."""

from __future__ import annotations

import json
import re
from pathlib import Path

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.state import ClientState
from braidlora.federated.protocol.wire import pack, parse
from braidlora.json_text import loads
from braidlora.runs import Committed, IncompleteError, commit_directory, remove_at_once, remove_leftovers

FOLDER, STATE = "state", "state.safetensors"
_COMMITTED, _PENDING = "round", "pending"
_OPTIMIZER = "optimizer:"


class ClientStore:
    """`state/round-N/` for each committed state and `state/pending-N/` for the pending one, each with a manifest.

    Every change is one rename, so a crash leaves the store as it was before or after. Older committed states are kept
    for as long as the server keeps a round that builds on them, and may be rolled back to it.

    Args:
        site: the client's own folder, on the client's machine.
        client: name of the client.
        keep_rounds: how many rounds the server keeps.
    """

    def __init__(self, site: Path, client: str, keep_rounds: int = 2) -> None:
        self.folder, self.client, self._keep_rounds = site / FOLDER, client, keep_rounds

    @property
    def committed(self) -> int:
        """Round of the newest committed state; 0 if there is none."""
        return max(self._rounds(_COMMITTED), default=0)

    @property
    def pending(self) -> int:
        """Round of the pending state; 0 if there is none."""
        return max(self._rounds(_PENDING), default=0)

    def load(self, round: int, experiment: str) -> ClientState:
        """The state of a round.

        Raises:
            CheckpointError: it is missing or damaged, or another client's, federation's or round's.
        """
        data, path = self.read(round)
        state = read_state(data, path, self.client, experiment)
        if state.round != round:
            raise CheckpointError(
                f"{path}: the state of round {state.round}; expected round {round}. The folder was renamed or copied: "
                "restore the client's own."
            )
        return state

    def read(self, round: int) -> tuple[bytes, Path]:
        """The verified bytes of a round's state, and its file.

        Raises:
            IncompleteError: it is missing or was cut short.
            CheckpointError: it has changed since it was written.
        """
        for kind in (_COMMITTED, _PENDING):
            folder = self.folder / f"{kind}-{round}"
            if folder.is_dir():
                return Committed(folder).read(STATE), folder / STATE
        raise IncompleteError(
            f"{self.folder}: client {self.client!r} has no state for round {round}, though its update counted."
        )

    def hold(self, state: ClientState) -> None:
        """Write a state as pending, and remove committed ones that no round of the server builds on any more.

        Raises:
            OSError: the disk is full or not writable; the store is unchanged.
        """
        remove_leftovers(self.folder)  # of a process that was killed here
        self._write(_PENDING, state.round, state_bytes(state))
        before = [number for number in self._rounds(_COMMITTED) if number <= state.round - self._keep_rounds]
        for number in before[:-1]:
            self._remove(_COMMITTED, number)

    def commit(self) -> None:
        """The pending state counted."""
        pending = self.pending
        (self.folder / f"{_PENDING}-{pending}").rename(self.folder / f"{_COMMITTED}-{pending}")

    def drop(self) -> None:
        """The pending state did not count."""
        self._remove(_PENDING, self.pending)

    def adopt(self, round: int, data: bytes) -> None:
        """Take the bytes of a state that counted in `round`, unless the store has it."""
        if round not in (*self._rounds(_COMMITTED), *self._rounds(_PENDING)):
            self._write(_COMMITTED, round, data)

    def roll_back(self, round: int) -> None:
        """Remove the states of all rounds after `round`, as the server did."""
        for kind in (_PENDING, _COMMITTED):
            for number in reversed(self._rounds(kind)):
                if number > round:
                    self._remove(kind, number)

    def _rounds(self, kind: str) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(rf"{kind}-(\d+)", entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _write(self, kind: str, round: int, data: bytes) -> None:
        with commit_directory(self.folder / f"{kind}-{round}") as staging:
            (staging / STATE).write_bytes(data)

    def _remove(self, kind: str, round: int) -> None:
        remove_at_once(self.folder / f"{kind}-{round}")


def state_bytes(state: ClientState) -> bytes:
    """A state as a safetensors file whose header names client, experiment and round."""
    header = json.dumps({"client": state.client, "experiment": state.experiment, "round": state.round})
    moments = {f"{_OPTIMIZER}{name}": tensor for name, tensor in state.optimizer.items()}
    return pack({**state.tensors, **moments}, header)


def read_state(data: bytes, path: Path, client: str, experiment: str) -> ClientState:
    """The state of `client` in `experiment`, from bytes that were read from `path`.

    Raises:
        CheckpointError: it is damaged, or another client's or federation's.
    """
    tensors, text = parse(data, str(path))
    try:
        header = loads(text)
        found = (header["client"], header["experiment"])
        round = int(header["round"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not the state of a client: its header is {text!r}.") from None
    for what, got, expected in zip(("client", "experiment"), found, (client, experiment), strict=True):
        if got != expected:
            raise CheckpointError(
                f"{path}: the state of {what} {got!r}; expected {what} {expected!r}. A client's state belongs to the "
                "federation it was made in: same recipe, data and base model."
            )
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
    moments = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    return ClientState(client, experiment, round, own, moments)

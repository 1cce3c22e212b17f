"""A progress line: round, clients, loss, bytes, time left."""

from __future__ import annotations

import statistics
import sys

from tqdm import tqdm

from braidlora.federated.simulation.runner import Reply
from braidlora.tables import format_bytes


class RoundBar:
    """A tqdm bar on stderr over all clients of all rounds.

    Args:
        rounds: how many there are.
        clients: how many take part in each.
        done: rounds that are done.
        shown: whether anything is shown.
    """

    def __init__(self, rounds: int, clients: int, done: int, shown: bool) -> None:
        self._rounds = rounds
        self._bytes = 0
        self._losses: list[float] = []
        self._bar = tqdm(
            total=rounds * clients,
            initial=done * clients,
            unit="client",
            disable=not shown,
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def begin(self, round: int) -> None:
        """A round begins."""
        self._losses = []
        self._bar.set_description_str(f"round {round}/{self._rounds}")

    def scoring(self, round: int) -> None:
        """The clients' models are being scored."""
        self._bar.set_description_str(f"round {round}/{self._rounds} scoring")

    def advance(self, reply: Reply, transferred: int) -> None:
        """A client is done; the number of bytes that it and the server exchanged."""
        self._bytes += transferred
        if reply.failure is None and reply.loss is not None:
            self._losses.append(reply.loss)
        shown = {"loss": f"{statistics.fmean(self._losses):.4f}"} if self._losses else {}
        self._bar.set_postfix({**shown, "sent": format_bytes(self._bytes)}, refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        """Print a line above the bar, where it stays."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()

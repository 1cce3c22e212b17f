"""One line that says how far a federation is: round, clients, loss, bytes, time to go."""

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
        asked: clients that are asked in each.
        done: rounds that are over.
        shown: whether anything is shown.
    """

    def __init__(self, rounds: int, asked: int, done: int, shown: bool) -> None:
        self._rounds = rounds
        self._bytes = 0
        self._losses: list[float] = []
        self._bar = tqdm(
            total=rounds * asked,
            initial=done * asked,
            unit="client",
            disable=not shown,
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def begin(self, round: int) -> None:
        """Show that a round begins."""
        self._losses = []
        self._bar.set_description_str(f"round {round}/{self._rounds}")

    def scoring(self, round: int) -> None:
        """Show that the clients' models are being scored."""
        self._bar.set_description_str(f"round {round}/{self._rounds} scoring")

    def heard(self, reply: Reply, down: int) -> None:
        """Show that a client is through."""
        self._bytes += len(reply.upload) + down
        if reply.failure is None:
            self._losses.append(reply.loss)
        shown = {"loss": f"{statistics.fmean(self._losses):.4f}"} if self._losses else {}
        self._bar.set_postfix({**shown, "sent": format_bytes(self._bytes)}, refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        """Say something that stays on the terminal, above the bar."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the line."""
        self._bar.close()

"""What a site's SuperNode does, as lines for people: read from its log, which says the rest."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

CONNECTED = "SuperNode ID:"
_FAILED, _AGAIN = "Connection attempt failed", "Connection successful"
_EVENTS = {
    "Receiving:": "received a message",
    "Sent successfully": "sent its answer",
}
_PATIENCE = 20.0  # seconds without a connection at the start
_LOST_AFTER = 5.0  # seconds of failed attempts; a single one is no news


class News:
    """Tells of what is new in a SuperNode's log.

    Args:
        log: the file; what it has now is old.
        name, server: of the site, and HOST:PORT of its server.
        say: told, a line at a time.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        log: Path,
        name: str,
        server: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._server, self._clock = log, server, clock
        self._say = lambda text: say(f"{name}: {text}")
        self._read = log.stat().st_size
        self._started = clock()
        self._connected = self._said = False  # said: that there is no connection
        self._failing: float | None = None  # since when attempts fail

    def look(self) -> None:
        """Read on, and look at the clock."""
        with open(self._log, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the rest of a line may follow
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._line(line)
        now = self._clock()
        if self._said:
            return
        if not self._connected and now - self._started >= _PATIENCE:
            self._said = True
            self._say(f"no answer from {self._server} yet{_why(self._server)}; retrying")
        elif self._connected and self._failing is not None and now - self._failing >= _LOST_AFTER:
            self._said = True
            self._say(f"connection to {self._server} lost; retrying")

    def _line(self, line: str) -> None:
        if CONNECTED in line:
            self._connected, self._said, self._failing = True, False, None
            self._say("connected")
        elif _FAILED in line:
            self._failing = self._clock() if self._failing is None else self._failing
        elif _AGAIN in line:
            if self._connected and self._said:
                self._said = False
                self._say("connected again")
            self._failing = None
        for words, text in _EVENTS.items():
            if words in line:
                self._say(text)


def _why(server: str) -> str:
    """Why there is no connection, in brackets; empty if the port is open."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3.0).close()
    except socket.gaierror:
        return f" (the name {host} cannot be resolved)"
    except TimeoutError:
        return " (timeout)"
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None)
        return f" ({text.lower()})" if text else ""
    return ""

"""A client's own log of its errors. Their texts may contain rows, so they never leave the site."""

from __future__ import annotations

import os
import traceback
from datetime import datetime, timezone
from pathlib import Path

from braidlora.federated.protocol.failure import failure_of

ERRORS = "errors.log"  # in a client's own folder


def keep_at_site(error: BaseException, site: Path, round: int) -> None:
    """Append the full exception to the client's log.

    Raises:
        OSError: it cannot be written; a link in its place is not followed.
    """
    site.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = "".join(traceback.format_exception(error))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(site / ERRORS, flags, 0o600), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time} round {round}: {failure_of(error)}\n{text}\n")

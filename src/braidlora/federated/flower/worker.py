"""A site's worker: a process with the base model, which answers messages over a socket that only its user can reach.

Flower starts a new process for every message. That process passes the message on to the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from braidlora.errors import BraidloraError, FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.json_text import loads
from braidlora.terminal import say

SOCKET_VARIABLE, KEY_VARIABLE, NAME_VARIABLE = (
    "BRAIDLORA_WORKER",
    "BRAIDLORA_WORKER_KEY",
    "BRAIDLORA_SITE_NAME",
)
FRESH_VARIABLE = "BRAIDLORA_ACCEPT_FRESH_STATE"
READY = "ready"
_TRIES, _PAUSE = 60, 1.0  # a worker that was lost is started again, and loads its base model


def ask_worker(socket: str, envelope: Envelope) -> Envelope:
    """The worker's answer. A worker that is lost is asked once more once it is back, one time.

    Raises:
        FederationError: there is no worker, or it was lost twice.
    """
    for _ in range(2):
        with _connected(socket) as connection:
            try:
                _send(connection, envelope)
                return _receive(connection)
            except (EOFError, ConnectionError):
                continue
    raise FederationError("the site's worker was lost twice while it answered; see the site's log.")


def _connected(socket: str) -> Connection:
    key = bytes.fromhex(os.environ[KEY_VARIABLE])
    for _ in range(_TRIES):
        try:
            return Client(socket, family="AF_UNIX", authkey=key)
        except (FileNotFoundError, ConnectionError, EOFError):
            time.sleep(_PAUSE)
    raise FederationError("the site's worker does not answer; see the site's log.")


def _send(connection: Connection, envelope: Envelope) -> None:
    connection.send_bytes(json.dumps([envelope.kind, envelope.header]).encode())
    connection.send_bytes(envelope.tensors)


def _receive(connection: Connection) -> Envelope:
    kind, header = loads(connection.recv_bytes())
    return Envelope(kind, header, connection.recv_bytes())


def main(folder: str) -> int:
    """Load a site's rows and base model, say so on stdout, and answer until the parent ends."""
    from braidlora.federated.flower.followers import check_devices, start_followers
    from braidlora.federated.flower.programs import end_with
    from braidlora.federated.flower.settings import read_site
    from braidlora.federated.flower.site_answerer import site_answerer
    from braidlora.federated.flower.site_recipe import site_config
    from braidlora.federated.site.group import Group

    os.umask(0o077)
    end_with(os.getppid())
    store = Path(os.environ[SOCKET_VARIABLE] + ".group")

    def start_group() -> Group:
        start_followers(Path(folder), settings.processes, store)
        return Group(store)

    try:
        settings = read_site(Path(folder))
        check_devices(Path(folder), settings)
        config = site_config(Path(folder), settings)
        fresh = os.environ.get(FRESH_VARIABLE) == "1"
        answerer = site_answerer(
            Path(folder),
            settings.name,
            config,
            accept_fresh=fresh,
            group=start_group if settings.processes > 1 else None,
        )
        answerer.runner()
    except BraidloraError as error:
        say(f"braidlora site: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    socket, key = os.environ[SOCKET_VARIABLE], bytes.fromhex(os.environ[KEY_VARIABLE])
    Path(socket).unlink(missing_ok=True)
    with Listener(socket, family="AF_UNIX", authkey=key) as listener:
        say(READY, flush=True)
        while True:
            try:
                with listener.accept() as connection:
                    envelope = _receive(connection)
                    start = time.monotonic()
                    answer = answerer.answer(settings.name, envelope)
                    failure = answer.header.get("failure")
                    say(
                        f"{envelope.kind}: {failure['code'] if failure else 'answered'} in "
                        f"{time.monotonic() - start:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    _send(connection, answer)
            except (EOFError, OSError, ValueError) as error:  # the other end is gone, or is not ours
                say(
                    f"braidlora site: a connection ended: {type(error).__name__}", file=sys.stderr, flush=True
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

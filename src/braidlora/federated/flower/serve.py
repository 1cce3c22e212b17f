"""`braidlora site serve`: the SuperLink with TLS and node authentication, and the keys of all sites registered."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.flower import programs
from braidlora.federated.flower.claim import claim
from braidlora.federated.flower.control import CONNECTION, HOME, flwr, is_up, write_flower_config
from braidlora.federated.flower.environment import check_installed, environment
from braidlora.federated.flower.settings import SERVER_FILE, ServerSettings, is_loopback, read_server

DATABASE, LOG = "superlink.db", "superlink.log"
_UP_WITHIN = 60.0


def serve(folder: Path, say: Callable[[str], None], until: Callable[[], bool] = lambda: False) -> None:
    """Run the SuperLink until it ends, a signal comes, or `until` says so.

    Args:
        folder: the server's.
        say: told what has happened, a line at a time.

    Raises:
        ConfigError: the settings cannot be used, or the port is in use.
        CheckpointError: the folder is served already.
        FederationError: the SuperLink does not start, or ends by itself.
        Interrupted: SIGTERM or Ctrl-C.
    """
    check_installed()
    folder = folder.absolute()
    settings = read_server(folder)
    with claim(folder / HOME, settings.host, settings.port, SERVER_FILE, "served"):
        _run(folder, settings, say, until)


def _run(
    folder: Path, settings: ServerSettings, say: Callable[[str], None], until: Callable[[], bool]
) -> None:
    write_flower_config(folder, settings)
    programs.write_programs(folder / HOME / "bin", site=False)
    env = environment(folder / HOME, folder / HOME / "bin")
    with open(folder / LOG, "ab") as log:
        process = programs.start(_command(folder, settings), env, log)
        try:
            _wait_until_up(folder, settings, process)
            say(f"SuperLink: listening on {settings.host}:{settings.port}")
            if settings.certificates is None:
                say("no TLS and no node authentication: for tests on this machine only")
            elif not is_loopback(settings.host):
                say("other machines can only reach the Fleet API; start runs from this machine")
            registered: dict[str, float] = {}
            while not until():
                settings = _register(folder, settings, registered, say)
                end = time.monotonic() + 5.0
                while time.monotonic() < end and not until():
                    if process.poll() is not None:
                        raise FederationError(
                            f"the SuperLink ended with code {process.returncode}; see {folder / LOG}."
                        )
                    time.sleep(0.2)
        finally:
            programs.stop(process)


def _command(folder: Path, settings: ServerSettings) -> list[str]:
    command = [sys.executable, "-m", "braidlora.federated.flower.superlink"]
    command += ["--host", settings.host, "--port", str(settings.port), "--database", str(folder / DATABASE)]
    command += ["--disable-runtime-dependency-installation"]
    if settings.certificates is None:
        return [*command, "--insecure"]
    tls = settings.certificates
    for option, path in (
        ("--ssl-ca-certfile", tls.ca),
        ("--ssl-certfile", tls.certificate),
        ("--ssl-keyfile", tls.key),
    ):
        command += [option, str(folder / path)]
    return [*command, "--enable-supernode-auth"] if settings.node_auth else command


def _wait_until_up(folder: Path, settings: ServerSettings, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _UP_WITHIN
    while time.monotonic() < end:
        if process.poll() is not None:
            raise FederationError(
                f"the SuperLink ended with code {process.returncode} before it was up; see {folder / LOG}. Is port "
                f"{settings.port} in use?"
            )
        if is_up(folder, settings):
            return
        time.sleep(0.3)
    raise FederationError(f"the SuperLink did not answer within {_UP_WITHIN:g} s; see {folder / LOG}.")


def _register(
    folder: Path, settings: ServerSettings, registered: dict[str, float], say: Callable[[str], None]
) -> ServerSettings:
    """Register the keys of server.yaml that are not yet; sites may be added while the SuperLink runs."""
    try:
        settings = read_server(folder)
    except ConfigError as error:  # while it is being edited
        say(str(error))
        return settings
    if not settings.node_auth:
        return settings
    for site, key in settings.sites.items():
        if key in registered:
            continue
        path = folder / HOME / f"{site}.pub"
        path.write_text(key + "\n", encoding="utf-8")
        done = flwr(folder, ["supernode", "register", str(path), CONNECTION, "--name", site])
        known = "already" in (done.stdout + done.stderr).lower()
        if done.returncode and not known:
            say(f"{site}: its key could not be registered: {(done.stderr or done.stdout).strip()[-300:]}")
            continue
        registered[key] = time.monotonic()
        say(f"{site}: key {'was registered before' if known else 'registered'}")
    return settings

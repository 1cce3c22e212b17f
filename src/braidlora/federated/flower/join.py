"""`braidlora site join`: a site's SuperNode, and the worker with its base model."""

from __future__ import annotations

import re
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from braidlora.errors import ConfigError, DataError, FederationError
from braidlora.federated.flower import programs
from braidlora.federated.flower.claim import claim
from braidlora.federated.flower.environment import check_installed, environment
from braidlora.federated.flower.settings import SITE_FILE, SiteSettings, read_site
from braidlora.federated.flower.site_news import News
from braidlora.federated.flower.site_recipe import site_config
from braidlora.federated.flower.worker import (
    FRESH_VARIABLE,
    KEY_VARIABLE,
    NAME_VARIABLE,
    READY,
    SOCKET_VARIABLE,
)

LOG, NODE_LOG, HOME = "site.log", "supernode.log", "flower"
_UP_WITHIN = 1800.0  # seconds to load a base model
_AGAIN_AFTER = 5.0  # between two starts of a worker that was lost


def join(
    folder: Path,
    say: Callable[[str], None],
    *,
    accept_fresh: bool = False,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Connect a site to its federation until a signal comes, the SuperNode ends, or `until` says so.

    Args:
        folder: the site's.
        say: told what has happened, a line at a time.
        accept_fresh: set the client's state aside if the server asks it to start from scratch.

    Raises:
        ConfigError, DataError: the settings, the recipe, the base model or the rows cannot be used, or the port is in
            use.
        CheckpointError: the folder is joined already.
        FederationError: the SuperNode ended.
        Interrupted: SIGTERM or Ctrl-C.
    """
    check_installed()
    folder = folder.absolute()
    settings = read_site(folder)
    site_config(folder, settings)  # what can be known before the base model is loaded
    with claim(folder / HOME, "127.0.0.1", settings.port, SITE_FILE, "joined"):
        _run(folder, settings, say, accept_fresh, until)


def _run(
    folder: Path,
    settings: SiteSettings,
    say: Callable[[str], None],
    accept_fresh: bool,
    until: Callable[[], bool],
) -> None:
    private = Path(
        tempfile.mkdtemp(prefix="braidlora-site-")
    )  # mode 0700; short, as names of sockets must be
    children: list[subprocess.Popen[bytes]] = []
    try:
        programs.write_programs(private / "bin", site=True)
        env = _environment(folder, settings, private, accept_fresh)
        worker = _start_worker(folder, env)
        children.append(worker)
        say(f"{settings.name}: base model and rows are loaded")
        with open(folder / NODE_LOG, "ab") as log:
            news = News(folder / NODE_LOG, settings.name, settings.server, say)
            node = programs.start(_node_command(folder, settings), env, log)
        children.append(node)
        say(f"{settings.name}: connecting to {settings.server}")
        while not until():
            news.look()
            if node.poll() is not None:
                news.look()
                raise FederationError(_why_ended(folder, node.returncode))
            if worker.poll() is not None:
                say(f"{settings.name}: the worker was lost (code {worker.returncode}); restarting it")
                children.remove(worker)
                time.sleep(_AGAIN_AFTER)
                worker = _start_worker(folder, env)
                children.append(worker)
            time.sleep(0.3)
    finally:
        for child in reversed(children):
            programs.stop(child)
        shutil.rmtree(private, ignore_errors=True)


def _environment(folder: Path, settings: SiteSettings, private: Path, accept_fresh: bool) -> dict[str, str]:
    env = environment(folder / HOME, private / "bin")
    env[SOCKET_VARIABLE], env[KEY_VARIABLE] = str(private / "worker"), secrets.token_hex(32)
    env[NAME_VARIABLE] = settings.name
    env[FRESH_VARIABLE] = "1" if accept_fresh else "0"
    if settings.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif settings.device != "auto":
        env["CUDA_VISIBLE_DEVICES"] = settings.device.partition(":")[2]
    (folder / HOME).mkdir(mode=0o700, exist_ok=True)
    return env


def _start_worker(folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker and wait until it is ready.

    Raises:
        ConfigError, DataError, FederationError: it ended; its last words are part of the message.
    """
    with open(folder / LOG, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "braidlora.federated.flower.worker", str(folder)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            preexec_fn=programs.end_with_parent if sys.platform == "linux" else None,
        )
    assert process.stdout is not None
    end = time.monotonic() + _UP_WITHIN
    try:
        while time.monotonic() < end:
            ready, _, _ = select.select([process.stdout], [], [], 0.5)
            if ready:
                line = process.stdout.readline().decode().strip()
                if line == READY:
                    return process
                if not line:
                    break
            if process.poll() is not None:
                break
    except BaseException:
        programs.stop(process)
        raise
    programs.stop(process, 1.0)
    text = (folder / LOG).read_bytes()[begin:].decode(errors="replace").strip()
    # Several processes may have said the same.
    last = re.sub(r"^braidlora site: ", "", "\n".join(dict.fromkeys(text.splitlines()[-30:])))
    kinds = {ConfigError.exit_code: ConfigError, DataError.exit_code: DataError}
    raise kinds.get(process.returncode, FederationError)(last or f"the worker ended; see {folder / LOG}.")


def _node_command(folder: Path, settings: SiteSettings) -> list[str]:
    command = [sys.executable, "-c", "from flwr.supernode.cli import flower_supernode; flower_supernode()"]
    command += ["--superlink", settings.server, "--host", "127.0.0.1", "--port", str(settings.port)]
    if settings.ca is None or settings.key is None:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(folder / settings.ca)]
    return [*command, "--auth-supernode-private-key", str(folder / settings.key)]


def _why_ended(folder: Path, code: int) -> str:
    log = (folder / NODE_LOG).read_bytes()[-4000:].decode(errors="replace")
    text = log.rpartition("Starting Flower SuperNode")[2]  # since its last start
    hint = ""
    if "Failed to activate" in text:
        hint = (
            " The server does not know this site's key: its operator binds it with `braidlora site add DIR NAME "
            "NODE.pub` while `braidlora site serve DIR` runs."
        )
    # Over HTTP (flwr 1.42) a rejected node ends with code 0, before it has an ID and without a word.
    elif "401" in text or "authentication" in text.lower() or (code == 0 and "SuperNode ID" not in text):
        hint = (
            " The server rejected this site's signature: the clock here is wrong (the server allows five minutes), or "
            "the key is not the registered one."
        )
    elif "certificate" in text.lower():
        hint = _certificate_hint(text)
    return f"the SuperNode ended with code {code}.{hint} See {folder / NODE_LOG}."


def _certificate_hint(log: str) -> str:
    """What to do about a server's certificate that was rejected."""
    if "certificate has expired" in log:
        return " The server's certificate has expired; its operator makes a new one."
    if "mismatch" in log:
        return (
            " The server's certificate was not issued for the host in `server`. Use a name of the certificate there, "
            "or have the server's operator make one with this host: "
            "`braidlora site init NEW-DIR --server --reached-as HOST`."
        )
    return (
        " The server's certificate does not match `ca`: copy the server's tls/ca.crt here again. If it is the right "
        "one, the certificate may not be issued for the host in `server`, which the server's operator names with "
        "`--reached-as`."
    )

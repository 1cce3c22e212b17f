"""Flower's command line, and what else of the server's machine reaches its SuperLink."""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.flower.environment import environment
from braidlora.federated.flower.names import key_of_node, plain_key
from braidlora.federated.flower.settings import ServerSettings, address_of
from braidlora.json_text import loads

CONNECTION = "braidlora"  # name of the SuperLink in Flower's own configuration
HOME = "flower"
_FLWR_TIMEOUT = 120.0
_LIST_TIMEOUT = 30.0
_UP_TIMEOUT = 10.0  # a busy SuperLink takes seconds; one that is down is known at once


def write_flower_config(folder: Path, settings: ServerSettings) -> None:
    """Tell Flower's command line where the SuperLink is, in a file of the folder's own."""
    home = folder / HOME
    home.mkdir(mode=0o700, exist_ok=True)
    tls = (
        f"root-certificates = {json.dumps(str(folder / settings.certificates.ca))}"
        if settings.certificates is not None
        else "insecure = true"
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{address_of(settings)}"\n{tls}\n',
        encoding="utf-8",
    )


def is_up(folder: Path, settings: ServerSettings) -> bool:
    """Whether the SuperLink answers."""
    scheme, context = "http", None
    if settings.certificates is not None:
        scheme = "https"
        context = ssl.create_default_context(cafile=str(folder / settings.certificates.ca))
    try:
        url = f"{scheme}://{address_of(settings)}/health"
        with urllib.request.urlopen(url, timeout=_UP_TIMEOUT, context=context) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def check_up(folder: Path, settings: ServerSettings) -> None:
    """Raise FederationError if the SuperLink does not answer."""
    if not is_up(folder, settings):
        raise FederationError(
            f"the SuperLink at {address_of(settings)} does not answer. Start it with: braidlora site serve {folder}"
        )


def flwr(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Flower's command line on the server's SuperLink."""
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *words]
    return _run(folder, command, _FLWR_TIMEOUT)


def ask_flwr(folder: Path, settings: ServerSettings, words: list[str]) -> dict[str, Any]:
    """The JSON that Flower's command line prints.

    Raises:
        FederationError: the SuperLink does not answer.
        ConfigError: it rejects the command.
    """
    write_flower_config(folder, settings)
    try:
        done = flwr(folder, [*words, "--format", "json"])
    except subprocess.TimeoutExpired:
        raise FederationError(
            f"the SuperLink at {address_of(settings)} did not answer `flwr {words[0]}` within {_FLWR_TIMEOUT:g} s; see "
            f"{folder / 'superlink.log'}."
        ) from None
    try:
        found = loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {}
    if done.returncode or not isinstance(found, dict) or not found.get("success", True):
        check_up(folder, settings)
        said = found.get("error-message") if isinstance(found, dict) else None
        text = str(said or done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(
            f"the SuperLink at {address_of(settings)} rejected `flwr {words[0]}`: "
            f"{text[-1].rstrip('.') if text else 'no reason given'}. See {folder / 'superlink.log'}."
        )
    return found


def nodes_now(folder: Path, settings: ServerSettings) -> list[dict[str, str]] | None:
    """The SuperNodes that the SuperLink knows, with `status` and `public_key`; None if it does not say."""
    with contextlib.suppress(OSError):  # somebody else's folder: `site serve` has written it
        write_flower_config(folder, settings)
    try:
        done = _run(
            folder, [sys.executable, "-m", "braidlora.federated.flower.nodes", CONNECTION], _LIST_TIMEOUT
        )
        found = loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return found if isinstance(found, list) else None


def connected_sites(settings: ServerSettings, nodes: Iterable[dict[str, str]]) -> dict[str, bool]:
    """Whether each site of server.yaml is connected, by its key. Empty without node authentication."""
    if not settings.node_auth:
        return {}
    online = {key_of_node(one["public_key"].encode()) for one in nodes if one["status"] == "online"}
    return {site: plain_key(key) in online for site, key in settings.sites.items()}


def _run(folder: Path, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(folder / HOME),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )

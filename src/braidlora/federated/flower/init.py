"""`braidlora site init` and `add`: the folders of a server and of sites, and which key belongs to which site."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML

from braidlora.config import FederatedConfig, find_recipe, load_config, name_problem
from braidlora.errors import ConfigError
from braidlora.federated.flower.addresses import address_problem, host_problem
from braidlora.federated.flower.certificates import make_certificates, make_node_key
from braidlora.federated.flower.files import check_certificate, read_public_key
from braidlora.federated.flower.names import plain_key
from braidlora.federated.flower.settings import SERVER_FILE, SITE_FILE, is_loopback, read_server
from braidlora.runs import atomic_write_text

_SERVER = """\
# The server of a federation; see docs/howto/deploy.md. Serve it: braidlora site serve {folder}
host: {host}  # where the SuperLink listens; 0.0.0.0: on all addresses of this machine
port: {port}
certificates: {certificates}
node_auth: {node_auth}
deadline: 3600  # seconds that a site has for its part of a round
absence: 120  # seconds that a site may be disconnected before the round continues without it
wait: 600  # seconds to wait for sites before the first round
sites: {{}}  # NAME: public key; `braidlora site add` writes it
"""
_SITE = """\
# A site of a federation; see docs/howto/deploy.md. Connect it: braidlora site join {folder}
name: {name}  # of the client in the recipe
server: {server}
ca: {ca}  # certificate of the authority that issued the server's certificate
key: {key}  # private: keep it at this site
# Relative paths start at this folder.
recipe: {recipe}  # same as the server's, except for file paths and compute settings
# model: /models/base  # path of the base model at this site
data: {{}}  # rows of this site, by task: {{triage: data/triage.jsonl}} or {{triage: {{train: a.jsonl, test: b.jsonl}}}}
# rank: 8
device: auto  # cpu, cuda:0
# batch_size: 8
# precision: bfloat16
port: {port}  # of the SuperNode's own interface, on the loopback
"""


def init_server(
    folder: Path, host: str, port: int, names: Iterable[str] = (), *, insecure: bool = False
) -> list[Path]:
    """Make a server's folder: settings, a development authority and the SuperLink's certificate.

    Args:
        host: where the SuperLink listens.
        names: names and addresses by which sites reach it, for the certificate.
        insecure: no TLS and no node authentication, which the loopback alone allows.

    Returns:
        the files that were written.

    Raises:
        ConfigError: the folder has files of these names.
    """
    if insecure and not is_loopback(host):
        raise ConfigError(
            f"--insecure: {host} can be reached from other machines; without TLS and node authentication the server "
            "listens on 127.0.0.1 only."
        )
    names = list(names)
    for option, given in [("--host", host), *(("--reached-as", name) for name in names)]:
        if problem := host_problem(given):
            raise ConfigError(f"{option} {given}: {problem}.")
    _check_port(port)
    path = folder / SERVER_FILE
    _make(folder, path)
    written = [path]
    if not insecure:
        known = [host] if host not in ("0.0.0.0", "::") else []
        make_certificates(folder / "tls", [*names, *known])
        written += [folder / "tls" / name for name in ("ca.crt", "ca.key", "server.crt", "server.key")]
    tls = "null" if insecure else "{ca: tls/ca.crt, certificate: tls/server.crt, key: tls/server.key}"
    auth = "false" if insecure else "true"
    atomic_write_text(
        path, _SERVER.format(folder=folder, host=f'"{host}"', port=port, certificates=tls, node_auth=auth)
    )
    read_server(folder)
    return written


def init_site(
    folder: Path, name: str, server: str, recipe: str | None, ca: Path | None, port: int, *, insecure: bool
) -> list[Path]:
    """Make a site's folder: settings, a key pair, copies of the recipe and of the authority's certificate.

    Args:
        name: of the client in the recipe.
        server: HOST:PORT of the SuperLink.
        recipe: a federated recipe; None: to be put there later.
        ca: certificate of the authority, if it is known; its key never leaves the server.
        port: of the SuperNode's own interface.

    Returns:
        the files that were written.
    """
    if problem := name_problem(name):
        raise ConfigError(f"--name {name}: {problem}.")
    if problem := address_problem(server):
        raise ConfigError(f"--superlink {server}: {problem}.")
    if insecure and ca is not None:
        raise ConfigError("--ca: has no effect with --insecure, which turns TLS off; remove one of them.")
    if insecure and not is_loopback(server.rpartition(":")[0].strip("[]")):
        raise ConfigError(
            f"--insecure: {server} is another machine; without TLS and its own key, anyone could reply as this site."
        )
    _check_port(port)
    path = folder / SITE_FILE
    _reject_existing(path)
    if recipe is not None:
        config = load_config(recipe, [], FederatedConfig)
        clients = [client.name for client in config.clients() or []]
        if clients and name not in clients:
            raise ConfigError(f"--name {name}: no client of {recipe}; they are {', '.join(clients)}.")
    if ca is not None:
        check_certificate(ca)
    _make(folder, path)
    written = [path]
    if not insecure:
        make_node_key(folder)
        written += [folder / "node.key", folder / "node.pub"]
    if recipe is not None:
        _copy(find_recipe(recipe), folder / "recipe.yaml")
        written.append(folder / "recipe.yaml")
    if ca is not None:
        _copy(ca, folder / "ca.crt")
        written.append(folder / "ca.crt")
    atomic_write_text(
        path,
        _SITE.format(
            folder=folder,
            name=name,
            server=server,
            recipe="recipe.yaml",
            port=port,
            ca="null" if insecure else "ca.crt",
            key="null" if insecure else "node.key",
        ),
    )
    return written


def add_site(folder: Path, name: str, key: Path) -> None:
    """Bind a site's name to its public key in the server's settings. A running `site serve` registers it.

    Raises:
        ConfigError: the key is not one, or the name or the key is taken.
    """
    settings = read_server(folder)
    if problem := name_problem(name):
        raise ConfigError(f"{name}: {problem}.")
    line = read_public_key(key)
    if settings.sites.get(name) == line:
        return
    if name in settings.sites:
        raise ConfigError(
            f"{folder / SERVER_FILE}: {name} has another key. Anyone with the new key could then reply as {name}: "
            "if this is intended, remove the old line first."
        )
    for other, known in settings.sites.items():
        if plain_key(known) == plain_key(line):
            raise ConfigError(f"{key}: this is the key of {other}; every site needs its own.")
    yaml = YAML()
    yaml.width = 4096
    path = folder / SERVER_FILE
    data = yaml.load(path.read_text(encoding="utf-8"))
    data["sites"] = {**dict(data.get("sites") or {}), name: line}
    text = io.StringIO()
    yaml.dump(data, text)
    atomic_write_text(path, text.getvalue())
    read_server(folder)


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected a port from 1 to 65535.")


def _copy(source: Path, target: Path) -> None:
    with contextlib.suppress(shutil.SameFileError):  # it is there already
        shutil.copyfile(source, target)


def _make(folder: Path, settings: Path) -> None:
    """Make the folder; raises ConfigError if it cannot be made, or has settings already."""
    _reject_existing(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{folder}: a file is in the way; choose another folder.") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created: {error.strerror}.") from None


def _reject_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError(f"{path}: exists already; nothing was written.")

"""The two YAML files of a deployment: `server.yaml` at the server, `site.yaml` at each site. Imports no torch."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import ConfigError

SERVER_FILE, SITE_FILE = "server.yaml", "site.yaml"
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CertificatesSection(_Section):
    """TLS of the SuperLink: PEM files, relative to the folder."""

    ca: Line = "tls/ca.crt"
    certificate: Line = "tls/server.crt"
    key: Line = "tls/server.key"


class ServerSettings(_Section):
    """`server.yaml`: where the SuperLink listens, how long it waits, and which key each site has."""

    host: Line = "127.0.0.1"
    port: Port = 9092
    certificates: CertificatesSection | None = CertificatesSection()
    node_auth: bool = True
    deadline: Seconds = 3600.0
    absence: Seconds = 120.0
    wait: Seconds = 600.0
    sites: dict[Line, Line] = {}

    @model_validator(mode="after")
    def _closed(self) -> ServerSettings:
        if not is_loopback(self.host) and (self.certificates is None or not self.node_auth):
            raise ValueError(
                f"host {self.host} can be reached from other machines, which needs `certificates` and "
                "`node_auth: true`; without both, listen on 127.0.0.1"
            )
        if self.node_auth and self.certificates is None:
            raise ValueError("`node_auth: true` needs `certificates`")
        if self.node_auth:
            from braidlora.federated.flower.names import plain_key

            known: dict[bytes, str] = {}
            for site, key in self.sites.items():
                try:
                    plain = plain_key(key)
                except ValueError as error:
                    raise ValueError(f"sites.{site}: not a public key: {error}") from None
                if plain in known:
                    raise ValueError(f"sites: {known[plain]} and {site} have the same key; give each its own")
                known[plain] = site
        return self


class SiteSettings(_Section):
    """`site.yaml`: one site's name, the server's address, and where its model and rows are."""

    name: Line
    server: Line
    ca: Line | None = "ca.crt"
    key: Line | None = "node.key"
    recipe: Line = "recipe.yaml"
    model: Line | None = None
    data: dict[Line, Line | dict[str, Line]] = {}
    rank: Annotated[int, Field(ge=1)] | None = None
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda:\d+)$")] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    precision: Line | None = None
    dtype: Line | None = None
    quantization: Line | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    port: Port = 9094

    @model_validator(mode="after")
    def _closed(self) -> SiteSettings:
        host = self.server.rpartition(":")[0].strip("[]")
        if not is_loopback(host) and (self.ca is None or self.key is None):
            raise ValueError(
                f"server {self.server} is another machine, which needs `ca` and `key`: without TLS and its own "
                "key, anyone could reply as this site"
            )
        if (self.ca is None) != (self.key is None):
            raise ValueError("`ca` and `key` go together: a key is only used over TLS")
        if self.processes > 1 and self.device.startswith("cuda:"):
            raise ValueError(
                f"processes: {self.processes} use one GPU each, but device {self.device} is one GPU; set device: auto, "
                "and CUDA_VISIBLE_DEVICES to choose among more GPUs"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only; a name counts if it is `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_server(folder: Path) -> ServerSettings:
    """The settings of a server's folder.

    Raises:
        ConfigError: the file is missing or not valid, or a private key can be read by others.
    """
    settings = load_config(_file(folder, SERVER_FILE, "--server"), [], ServerSettings)
    if settings.certificates is not None:
        check_private(folder / settings.certificates.key)
    return settings


def read_site(folder: Path) -> SiteSettings:
    """The settings of a site's folder; raises as `read_server`."""
    settings = load_config(_file(folder, SITE_FILE, "--name NAME"), [], SiteSettings)
    if settings.key is not None:
        check_private(folder / settings.key)
    return settings


def site_config(folder: Path, settings: SiteSettings) -> FederatedConfig:
    """The recipe as it is at a site: its own copy, with the site's places and ways to compute.

    Raises:
        ConfigError: the recipe is not valid, or has no such client or task.
    """
    overrides = list(_overrides(folder, settings))
    recipe: str | Path = folder / settings.recipe
    config = load_config(recipe if Path(recipe).is_file() else settings.recipe, overrides, FederatedConfig)
    names = [client.name for client in config.clients() or []]
    if names and settings.name not in names:
        raise ConfigError(
            f"{folder / SITE_FILE}: name {settings.name!r} is not a client of the recipe; they are {', '.join(names)}."
        )
    return config.model_copy(update={"output": str(folder / "unused")})


def _overrides(folder: Path, settings: SiteSettings) -> Sequence[str]:
    found = []
    if settings.model is not None:
        found.append(f"model.path={_quoted(_place(folder, settings.model))}")
    for task, sources in settings.data.items():
        for part, source in ({"train": sources} if isinstance(sources, str) else sources).items():
            found.append(f"tasks.{task}.{part}={_quoted(_place(folder, source))}")
    for key, value in (
        ("training.batch_size", settings.batch_size),
        ("training.precision", settings.precision),
        ("training.threads", settings.threads),
        ("model.dtype", settings.dtype),
        ("model.quantization", settings.quantization),
        (f"federation.clients.{settings.name}.rank", settings.rank),
    ):
        if value is not None:
            found.append(f"{key}={value}")
    return found


def _place(folder: Path, path: str) -> str:
    """A path of site.yaml, relative to its folder; names of other kinds (`generated:sum`, `embedded`) as they are."""
    return str(folder.absolute() / path) if (folder / path).exists() else path


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def check_private(path: Path) -> None:
    """Reject a private key that is missing or that others than its owner can read.

    Raises:
        ConfigError: with the command that repairs it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: the private key cannot be read: {error.strerror}.") from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"{path}: mode {mode:04o} lets others read this private key; run: chmod 600 {path}. If others may have "
            "read it, make a new one."
        )


def _file(folder: Path, name: str, option: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Make it with: braidlora site init {folder} {option}.")
    return path


def address_of(settings: ServerSettings) -> str:
    """Where programs on the server's own machine reach the SuperLink."""
    host = settings.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def as_json(settings: BaseModel) -> dict[str, Any]:
    """The settings as JSON values."""
    return settings.model_dump(mode="json")

"""The two YAML files of a deployment: `server.yaml` at the server, `site.yaml` at each site. Imports no torch."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from braidlora.config import load_config
from braidlora.errors import ConfigError
from braidlora.federated.flower.addresses import address_problem, host_problem
from braidlora.federated.flower.files import check_certificate, check_pair, check_private

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
        if problem := host_problem(self.host):
            raise ValueError(f"host {self.host}: {problem}")
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
        if problem := address_problem(self.server):
            raise ValueError(f"server {self.server}: {problem}")
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
        ConfigError: the file is missing or not valid, a certificate or key cannot be used, or a private key can be
            read by others.
    """
    settings = load_config(_file(folder, SERVER_FILE, "--server"), [], ServerSettings)
    if settings.certificates is not None:
        check_certificate(folder / settings.certificates.ca)
        check_pair(folder / settings.certificates.certificate, folder / settings.certificates.key)
    return settings


def read_site(folder: Path) -> SiteSettings:
    """The settings of a site's folder; raises as `read_server`."""
    settings = load_config(_file(folder, SITE_FILE, "--name NAME"), [], SiteSettings)
    if settings.ca is not None:
        check_certificate(folder / settings.ca, "copy the server's tls/ca.crt there")
    if settings.key is not None:
        check_private(folder / settings.key)
    return settings


def _file(folder: Path, name: str, option: str) -> Path:
    path = folder / name
    try:
        there = path.is_file()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    if not there:
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

"""The answerer of one site: its own rows, its own states, in its own folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from braidlora.config import FederatedConfig
from braidlora.federated.flower.answerer import Answerer
from braidlora.federated.flower.certificates import write_private
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.group import Group
from braidlora.federated.site.load import load_site, warn_of_site

RESULTS = "federations"  # a folder for each experiment


def site_clients(name: str, config: FederatedConfig, *, warn: bool = False) -> Clients:
    """Load a site's rows.

    Raises:
        ConfigError, DataError: the recipe does not fit, or the rows cannot be used.
    """
    site = load_site(config, name)
    if warn:
        warn_of_site(config, site)
    return Clients({name: site.client}, site.label_space, site.common)


def site_answerer(
    folder: Path,
    name: str,
    config: FederatedConfig,
    *,
    accept_fresh: bool = False,
    group: Callable[[], Group] | None = None,
) -> Answerer:
    """Load a site's rows; the base model follows when it is first needed.

    Args:
        group: joins the processes that train with this one.

    Raises:
        ConfigError, DataError: as `site_clients`.
    """
    clients = site_clients(name, config, warn=True)
    secret = folder / "digest.key"
    if not secret.exists():
        write_private(secret, secrets.token_hex(32).encode())
    return Answerer(
        config,
        clients,
        lambda _, experiment: folder / RESULTS / (experiment or "none"),
        secret=bytes.fromhex(secret.read_text().strip()),
        accept_fresh=accept_fresh,
        group=group,
    )

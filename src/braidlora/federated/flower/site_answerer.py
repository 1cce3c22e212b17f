"""The answerer of one site: its own rows, its own states, in its own folder."""

from __future__ import annotations

import secrets
from pathlib import Path

from braidlora.config import FederatedConfig
from braidlora.federated.flower.answerer import Answerer
from braidlora.federated.flower.certificates import write_private
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.load import load_site, warn_of_site

RESULTS = "federations"  # a folder for each experiment


def site_answerer(
    folder: Path, name: str, config: FederatedConfig, *, accept_fresh: bool = False
) -> Answerer:
    """Load a site's rows.

    Raises:
        ConfigError, DataError: the recipe does not fit, or the rows cannot be used.
    """
    site = load_site(config, name)
    warn_of_site(config, site)
    secret = folder / "digest.key"
    if not secret.exists():
        write_private(secret, secrets.token_hex(32).encode())
    return Answerer(
        config,
        Clients({name: site.client}, site.label_space, site.common),
        lambda _, experiment: folder / RESULTS / (experiment or "none"),
        secret=bytes.fromhex(secret.read_text().strip()),
        accept_fresh=accept_fresh,
    )

"""Local: every client on its own."""

from __future__ import annotations

from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.federated.protocol.rules._base import Rule


class Local(Rule):
    """Clients train A and B on their own data and send nothing: the reference that sharing is measured against."""

    name = "local"
    uploads = ()
    downloads = ()
    keeps = ()
    ranks = "any"
    one_scaling = False
    accepts_robust = False

    def __init__(self, **settings: object) -> None:
        if settings.get("also_share"):
            raise ConfigError("rule 'local' shares nothing; leave out also_share, or choose another rule")
        super().__init__(**settings)  # type: ignore[arg-type]

    def finish(self) -> dict[str, Tensor]:
        """Nothing, whoever took part."""
        return {}

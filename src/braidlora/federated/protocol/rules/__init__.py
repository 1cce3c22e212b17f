"""The aggregation rules, by name."""

from __future__ import annotations

import difflib
from typing import Any

from braidlora.errors import ConfigError
from braidlora.federated.protocol.rules._base import Rule
from braidlora.federated.protocol.rules.fed_alora import FedALoRA
from braidlora.federated.protocol.rules.fed_alora_het import FedALoRAHet
from braidlora.federated.protocol.rules.fedit import FedIT
from braidlora.federated.protocol.rules.fedsa_lora import FedSALoRA
from braidlora.federated.protocol.rules.ffa_lora import FFALoRA
from braidlora.federated.protocol.rules.flexlora import FlexLoRA
from braidlora.federated.protocol.rules.flora import FLoRA
from braidlora.federated.protocol.rules.local import Local
from braidlora.federated.protocol.rules.zero_padding import ZeroPadding

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (Local, FedIT, FFALoRA, FedSALoRA, FedALoRA, ZeroPadding, FLoRA, FlexLoRA, FedALoRAHet)
}
RULE_NAMES = tuple(RULES)
# Settings of one rule alone.
_OWN = {
    FedALoRAHet.name: ("wire",),
    FlexLoRA.name: ("max_rank",),
    ZeroPadding.name: ("padding",),
}


def get_rule(name: str, **settings: Any) -> Rule:
    """A new rule.

    Args:
        settings: `also_share`, `aggregator`; `wire` for fed-alora-het, `max_rank` for flexlora, `padding` for
            zero-padding.

    Raises:
        ConfigError: no rule has this name, or the setting is unknown to it or not allowed.
    """
    if name not in RULES:
        close = difflib.get_close_matches(str(name), RULE_NAMES, n=1)
        raise ConfigError(
            f"unknown aggregation rule {name!r}{f'; did you mean {close[0]!r}?' if close else ''} "
            f"The rules are {', '.join(RULE_NAMES)}"
        )
    known = {"also_share", "aggregator", *_OWN.get(name, ())}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ConfigError(
            f"rule {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return RULES[name](**settings)


__all__ = ["RULES", "RULE_NAMES", "Rule", "get_rule"]

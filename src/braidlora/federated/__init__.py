"""Federated fine-tuning: what clients send, how a server aggregates it, and what it rejects.

rule = get_rule("fed-alora")
rule.start(shared)
for update in updates:           # in the order of the clients' names
    rule.add(update)
shared = rule.finish()
payload = rule.payload_for(shared, rank=8)

Importing this package does not import torch: recipes read the rules' specs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.rules import RULE_NAMES, RuleSpec, Turn, get_rule, register_rule
from braidlora.federated.protocol.update import ClientUpdate

if TYPE_CHECKING:
    from braidlora.federated.protocol.rules.rule import Rule

__all__ = [
    "RULE_NAMES",
    "AdaptedLayer",
    "ClientUpdate",
    "Rule",
    "RuleSpec",
    "Turn",
    "get_rule",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    if name == "Rule":
        from braidlora.federated.protocol.rules.rule import Rule

        return Rule
    raise AttributeError(f"module 'braidlora.federated' has no attribute {name!r}")

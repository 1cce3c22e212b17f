"""Federated fine-tuning: what clients send, how a server aggregates it, and what it refuses.

rule = get_rule("fed-alora")
rule.start(shared)
for update in updates:           # in the order of the clients' names
    rule.add(update)
shared = rule.finish()
payload = rule.payload_for(shared, rank=8)
"""

from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.rules import RULE_NAMES, Rule, get_rule
from braidlora.federated.protocol.update import ClientUpdate

__all__ = ["RULE_NAMES", "AdaptedLayer", "ClientUpdate", "Rule", "get_rule"]

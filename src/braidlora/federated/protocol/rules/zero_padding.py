"""ZeroPadding: factors of different ranks, padded with zeros and averaged."""

from braidlora.federated.protocol.factors import LORA
from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="zero-padding",
    label="ZeroPadding",
    uploads=LORA,
    downloads=LORA,
    ranks="any",
    exact=False,
    robust=False,
    no_privacy="padding moves ranks that a client does not have toward zero, and no clip of the client's change "
    "bounds that",
    settings=("padding",),
    implementation="braidlora.federated.protocol.rules.zero_padding_rule:ZeroPadding",
)

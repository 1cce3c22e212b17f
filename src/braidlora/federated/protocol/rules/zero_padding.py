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
    settings=("padding",),
    implementation="braidlora.federated.protocol.rules.zero_padding_rule:ZeroPadding",
)

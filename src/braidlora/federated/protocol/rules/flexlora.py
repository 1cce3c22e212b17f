"""FlexLoRA: the exact sum, cut to each client's rank by its singular values."""

from braidlora.federated.protocol.factors import LORA
from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="flexlora",
    label="FlexLoRA",
    uploads=LORA,
    downloads=LORA,
    ranks="any",
    one_scaling=False,
    exact=True,
    streams=False,
    multiplies=LORA,
    payload_by_rank=True,
    robust=False,
    no_momentum="every round decomposes the update again, so its factors have a different basis in every round",
    no_privacy="it decomposes a sum of products in every round, and does not average changes",
    settings=("max_rank",),
    implementation="braidlora.federated.protocol.rules.flexlora_rule:FlexLoRA",
)

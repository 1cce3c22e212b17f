"""raFLoRA: like FlexLoRA, but every rank counts over the clients that have it."""

from braidlora.federated.protocol.factors import LORA
from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="raflora",
    label="raFLoRA",
    uploads=LORA,
    downloads=LORA,
    ranks="any",
    one_scaling=False,
    exact=False,
    streams=False,
    multiplies=LORA,
    payload_by_rank=True,
    robust=False,
    no_momentum="every round decomposes the update again, so its factors have a different basis in every round",
    no_privacy="it decomposes a sum of products in every round, and does not average changes",
    settings=("max_rank", "levels"),
    implementation="braidlora.federated.protocol.rules.raflora_rule:RaFLoRA",
)

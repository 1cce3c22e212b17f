"""FLoRA: stacking, which is exact for any ranks."""

from braidlora.federated.protocol.factors import CARRIED, LORA
from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="flora",
    label="FLoRA",
    uploads=LORA,
    downloads=LORA,
    carried=CARRIED,
    restarts=LORA,
    ranks="any",
    one_scaling=False,
    exact=True,
    streams=False,
    multiplies=LORA,
    robust=False,
    no_momentum="every round adds a new stack, and no factor continues from round to round",
    no_privacy="clients receive each other's factors side by side, not an average",
    implementation="braidlora.federated.protocol.rules.flora_rule:FLoRA",
)

"""FedALT: every client mixes its own LoRA with a frozen mean of the others'."""

from braidlora.federated.protocol.factors import LORA, REST
from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="fedalt",
    label="FedALT",
    trains=(*LORA, "mixer"),
    uploads=LORA,
    downloads=REST,
    adapter="pair",
    robust=False,
    not_robust="a client subtracts its own part from the mean that it receives, which is only possible with a mean",
    no_momentum="a client subtracts its own part from the mean that it receives, which is only possible with a mean",
    no_privacy="a client takes its own part out of the mean, for which it must know the number of participants",
    least_clients=2,
    implementation="braidlora.federated.protocol.rules.fedalt_rule:FedALT",
)

"""Fed-ALoRA for clients of different ranks: the products B2 B1 are summed into a common base."""

from braidlora.federated.protocol.rules.spec import RuleSpec

SPEC = RuleSpec(
    name="fed-alora-het",
    label="Fed-ALoRA, heterogeneous",
    trains=("factoredlora_A", "factoredlora_M", "factoredlora_B1", "factoredlora_B2"),
    uploads=("factoredlora_B1", "factoredlora_B2"),
    downloads=("factoredlora_base",),
    adapter="factored",
    restarts=("factoredlora_B1", "factoredlora_B2"),
    ranks="any",
    multiplies=("factoredlora_B1", "factoredlora_B2"),
    settings=("wire",),
    wires=("factors", "smallest"),
    implementation="braidlora.federated.protocol.rules.fed_alora_het_rule:FedALoRAHet",
)

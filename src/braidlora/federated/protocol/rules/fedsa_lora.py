"""FedSA-LoRA: A is shared, B stays with the client."""

from braidlora.federated.protocol.rules.spec import RuleSpec

# A ← Σ pᵢ Aᵢ; every client keeps its own B from round to round (Guo et al., arXiv 2410.01463).
SPEC = RuleSpec(name="fedsa-lora", label="FedSA-LoRA", uploads=("lora_A",), downloads=("lora_A",))

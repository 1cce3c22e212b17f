"""Fed-ALoRA: B is shared, A stays with the client."""

from braidlora.federated.protocol.rules.spec import RuleSpec

# B ← Σ pᵢ Bᵢ; every client keeps its own A from round to round (arXiv 2509.25414). Per round and layer d·r numbers
# travel down and d·r up.
SPEC = RuleSpec(name="fed-alora", label="Fed-ALoRA", uploads=("lora_B",), downloads=("lora_B",))

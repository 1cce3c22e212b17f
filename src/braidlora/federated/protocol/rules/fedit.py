"""FedIT: the mean of A and the mean of B."""

from braidlora.federated.protocol.factors import LORA
from braidlora.federated.protocol.rules.spec import RuleSpec

# A ← Σ pᵢ Aᵢ and B ← Σ pᵢ Bᵢ, each by itself (Zhang et al., arXiv 2305.05644). The product of the means is not the mean
# of the products, so the effective update is biased; docs/reference/federated-rules.md gives the measured error.
SPEC = RuleSpec(name="fedit", label="FedIT", uploads=LORA, downloads=LORA, exact=False)

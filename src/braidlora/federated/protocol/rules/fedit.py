"""FedIT: the mean of A and the mean of B."""

from braidlora.federated.protocol.rules._base import Rule


class FedIT(Rule):
    """A ← Σ pᵢ Aᵢ and B ← Σ pᵢ Bᵢ, each on its own (Zhang et al., arXiv 2305.05644).

    The product of the means is not the mean of the products, so the effective update is biased;
    `docs/federated-rules.md` gives the measured error.
    """

    name = "fedit"
    uploads = ("lora_A", "lora_B")
    downloads = ("lora_A", "lora_B")
    keeps = ("lora_A", "lora_B")
    exact = False

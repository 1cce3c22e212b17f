"""Fed-ALoRA: B is shared, A stays with the client."""

from braidlora.federated.protocol.rules._base import Rule


class FedALoRA(Rule):
    """B ← Σ pᵢ Bᵢ; every client keeps its own A, which lives on from round to round (arXiv 2509.25414).

    Per round and layer d·r numbers travel down and d·r up.
    """

    name = "fed-alora"
    uploads = ("lora_B",)
    downloads = ("lora_B",)
    keeps = ("lora_B",)

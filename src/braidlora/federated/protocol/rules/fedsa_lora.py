"""FedSA-LoRA: A is shared, B stays with the client."""

from braidlora.federated.protocol.rules._base import Rule


class FedSALoRA(Rule):
    """A ← Σ pᵢ Aᵢ; every client keeps its own B from round to round (Guo et al., arXiv 2410.01463)."""

    name = "fedsa-lora"
    uploads = ("lora_A",)
    downloads = ("lora_A",)
    keeps = ("lora_A",)

"""FFA-LoRA: A frozen and the same for all, the mean of B."""

from braidlora.federated.protocol.rules._base import Rule


class FFALoRA(Rule):
    """B ← Σ pᵢ Bᵢ over a frozen A that all clients drew from one seed (Sun et al., arXiv 2403.12313).

    ΔW is linear in B, so the aggregate is exact. A never travels.
    """

    name = "ffa-lora"
    trains = ("lora_B",)
    uploads = ("lora_B",)
    downloads = ("lora_B",)
    keeps = ("lora_B",)
    exact = True
    needs_shared_init = True

"""FFA-LoRA: A frozen and the same for all, the mean of B."""

from braidlora.federated.protocol.rules.spec import RuleSpec

# B ← Σ pᵢ Bᵢ over a frozen A that all clients draw from one seed (Sun et al., arXiv 2403.12313). ΔW is linear in B, so
# the aggregate is exact. A never travels.
SPEC = RuleSpec(
    name="ffa-lora",
    label="FFA-LoRA",
    trains=("lora_B",),
    uploads=("lora_B",),
    downloads=("lora_B",),
    exact=True,
    needs_shared_init=True,
)

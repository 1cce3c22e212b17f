"""RoLoRA: B in odd rounds, A in even ones, the other factor frozen and the same for all."""

from braidlora.federated.protocol.factors import LORA
from braidlora.federated.protocol.rules.spec import RuleSpec, Turn

_A, _B = ("lora_A",), ("lora_B",)

# One factor per round is trained, sent and averaged (Chen et al., arXiv 2502.01755). ΔW is linear in it while the other
# factor is common to all clients, so every round is exact, at half of FedIT's bytes. The round's number, which the
# server sends, decides whose turn it is; a client that missed a round is sent both factors.
SPEC = RuleSpec(
    name="rolora",
    label="RoLoRA",
    uploads=LORA,
    downloads=LORA,
    turns=(Turn(_B, _B, _B), Turn(_A, _A, _A)),
    exact=True,
    needs_shared_init=True,
)

"""The multi-LoRA layer written as its formula says, one expert after the other: the reference of the tests.

    y = W0 x + b + s · Σᵢ wᵢ(x) Bᵢ Aᵢ x,   w = softmax(W_g x / τ)

with Bᵢ = B for share="B" and Aᵢ = A for share="A". It shares no code with the package.
"""

import torch


def experts(A, B, share, N):
    """Cut the stored matrices into N pairs (Aᵢ, Bᵢ)."""
    r = (A.shape[0] if share == "A" else A.shape[0] // N) if N > 1 else A.shape[0]
    pairs = []
    for i in range(N):
        Ai = A if share == "A" else A[i * r : (i + 1) * r]
        Bi = B if share == "B" else B[:, i * r : (i + 1) * r]
        pairs.append((Ai, Bi))
    return pairs


def expert_loop(x, W0, bias, A, Wg, B, *, share, N, scaling, temperature=1.0, masks=None):
    """y (…, d). `masks`: what multiplies x before the A's, one per expert, or one alone for all."""
    y = torch.einsum("...k,dk->...d", x, W0)
    if bias is not None:
        y = y + bias
    if N == 1:
        w = torch.ones(*x.shape[:-1], 1, dtype=x.dtype)
    else:
        logits = torch.einsum("...k,nk->...n", x, Wg) / temperature
        w = torch.exp(logits - logits.max(-1, keepdim=True).values)
        w = w / w.sum(-1, keepdim=True)
    for i, (Ai, Bi) in enumerate(experts(A, B, share, N)):
        xi = x if masks is None else x * masks[i % len(masks)]
        y = y + scaling * w[..., i : i + 1] * ((xi @ Ai.T) @ Bi.T)
    return y

"""The multi-LoRA layer's mathematics as pure functions (arXiv 2509.25414, section 3; HydraLoRA arXiv 2404.19245).

    share="B" (ALoRA)      y = W0 x + s·B Σᵢ wᵢ(x) Aᵢ x
    share="A" (HydraLoRA)  y = W0 x + s·Σᵢ wᵢ(x) Bᵢ A x
    share="none" (MoE)     y = W0 x + s·Σᵢ wᵢ(x) Bᵢ Aᵢ x          w(x) = softmax(W_g x / τ)

B commutes with the gate, so experts are never run one by one: all A's are one matrix, all B's are one matrix, and the
gate acts between them on tensors of r or N·r columns.

Suffixes name the axes: T tokens (all leading dimensions), K in_features, D out_features, N experts, R rank,
G = rows of the stacked A (N·R, or R where A is shared), U = columns of the stacked B (N·R, or R where B is shared).
"""

from __future__ import annotations

import torch
from torch import Tensor

from braidlora.adapters.sharing import SCHEMES


def stacked_ranks(share: str, num_experts: int, r: int) -> tuple[int, int]:
    """(G, U): how many rows the stacked A and how many columns the stacked B have."""
    blocks_A, blocks_B = SCHEMES[share].blocks(num_experts)
    return blocks_A * r, blocks_B * r


def gate_weights(logits_TN: Tensor, temperature: float = 1.0) -> Tensor:
    """Router weights softmax(logits / temperature), (…, N), in float32 (float64 for float64 logits)."""
    if logits_TN.dtype == torch.float32 and temperature == 1.0:
        return torch.softmax(logits_TN, -1)
    dtype = torch.promote_types(logits_TN.dtype, torch.float32)
    return torch.softmax(
        logits_TN.to(dtype) / temperature if temperature != 1.0 else logits_TN, -1, dtype=dtype
    )


def mix(h_TG: Tensor, w_TN: Tensor, share: str) -> Tensor:
    """Gate the shrunk input: (T, G) and (T, N) → (T, U), in the weights' dtype.

    share="B": Σᵢ wᵢ hᵢ; "A": (w₁h … w_Nh); "none": (w₁h₁ … w_Nh_N).
    """
    own = SCHEMES[share].per_expert
    h_TNR = h_TG.unflatten(-1, (w_TN.shape[-1], -1)) if "A" in own else h_TG.unsqueeze(-2)
    gated_TNR = w_TN.unsqueeze(-1) * h_TNR
    return gated_TNR.flatten(-2) if "B" in own else gated_TNR.sum(-2)


def mix_backward(grad_TU: Tensor, h_TG: Tensor, w_TN: Tensor, share: str) -> tuple[Tensor, Tensor]:
    """Gradients of `mix` with respect to h (T, G) and w (T, N), in the weights' dtype."""
    own = SCHEMES[share].per_expert
    tokens, experts = w_TN.shape
    rank = grad_TU.shape[-1] // (experts if "B" in own else 1)
    w_TN1 = w_TN.unsqueeze(-1)
    grad_TU = grad_TU.to(w_TN.dtype)
    # `reshape`: gradients may be batched (`is_grads_batched`), which not every view operation allows.
    grad_TNR = grad_TU.reshape(tokens, experts, rank) if "B" in own else grad_TU.unsqueeze(-2)
    h_TNR = h_TG.reshape(tokens, experts, rank) if "A" in own else h_TG.unsqueeze(-2)
    grad_w_TN = (grad_TNR * h_TNR).sum(-1)
    grad_h_TNR = w_TN1 * grad_TNR
    return (grad_h_TNR.reshape(h_TG.shape) if "A" in own else grad_h_TNR.sum(-2)), grad_w_TN


def static_factors(A: Tensor, B: Tensor, w_N: Tensor, share: str) -> tuple[Tensor, Tensor]:
    """The one A and one B that equal N experts under constant weights w (arXiv 2509.25414, section 3).

    share="B": A = Σ wᵢAᵢ (r, k), B (d, r). share="A": A (r, k), B = Σ wᵢBᵢ (d, r).
    share="none": the stack, A = [Aᵢ] (N·r, k) and B = [wᵢBᵢ] (d, N·r).

    Args:
        A: (N·r, k), or (r, k) for share="A".
        B: (d, N·r), or (d, r) for share="B".
        w_N: (N,).
    """
    experts, own = w_N.shape[0], SCHEMES[share].per_expert
    if experts == 1:
        return A, B
    A, B = at_least_float32(A), at_least_float32(B)
    w_N = w_N.to(torch.promote_types(A.dtype, torch.float64))
    if "B" not in own:
        if "A" in own:
            A = torch.einsum("n,nrk->rk", w_N, A.unflatten(0, (experts, -1)).to(w_N.dtype)).to(A.dtype)
        return A, B
    if "A" not in own:
        return A, torch.einsum("n,dnr->dr", w_N, B.unflatten(1, (experts, -1)).to(w_N.dtype)).to(B.dtype)
    return A, (B.unflatten(1, (experts, -1)) * w_N[:, None]).flatten(1).to(B.dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it has 16 bits, so that sums and products of factors are not rounded to 16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def balance_loss(w_TN: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """How unevenly the experts are used: N Σᵢ p̄ᵢ² − 1, with p̄ᵢ the mean weight of expert i over the counted tokens.

    This is the squared coefficient of variation of the experts' importance (Shazeer et al., arXiv 1701.06538,
    equation 7): 0 when all are used equally, N − 1 when one has all the weight.

    Args:
        w_TN: router weights.
        mask_T: true for counted tokens; None counts all.
    """
    w_TN = w_TN.flatten(0, -2)
    if mask_T is None:
        p_N = w_TN.mean(0)
    else:
        m_T = mask_T.to(w_TN.dtype)
        p_N = (m_T.unsqueeze(-1) * w_TN).sum(0) / m_T.sum().clamp(min=1.0)
    return w_TN.shape[-1] * p_N.square().sum() - 1.0


def balance_gradient(w_TN: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Gradient of `balance_loss` with respect to w: 2N p̄ᵢ / T for every counted token; (1, N), or (T, N) masked."""
    tokens, experts = w_TN.shape
    if mask_T is None:
        return w_TN.mean(0, keepdim=True) * (2.0 * experts / max(tokens, 1))
    m_T1 = mask_T.to(w_TN.dtype).unsqueeze(-1)
    count = m_T1.sum().clamp(min=1.0)
    return (m_T1 * w_TN).sum(0, keepdim=True) * (2.0 * experts) / count.square() * m_T1

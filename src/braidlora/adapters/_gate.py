"""The gate: what happens between the stacked A and the stacked B, forward and backward.

    z (T, P) = [h (T, G) | logits (T, N) | padding] ──► w = softmax(logits / τ) ──► u (T, U) = mix(h, w)

It acts on tensors of a few columns, where starting an operation takes longer than running it. So there are kernels for
CUDA, and elsewhere as few operations as possible. Where backward must be careful (see `_fused`), it runs operations
that can be differentiated and that overwrite nothing.

Suffixes: T tokens, N experts, R rank, G rows of the stacked A, U columns of the stacked B, P ≥ G + N columns of z.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from braidlora.adapters import functional
from braidlora.adapters._balance import Attachment
from braidlora.adapters._torch_state import is_observed


class Gate(NamedTuple):
    """What happens between the stacked A and the stacked B; `balance` is 0 outside of training."""

    share: str
    num_experts: int
    r: int
    temperature: float
    balance: float

    def sizes(self, columns: int) -> tuple[int, int, int]:
        """How the columns of z are divided: G, N and padding."""
        experts = self.num_experts
        G, _ = functional.stacked_ranks(self.share, experts, self.r)
        return G, experts, columns - G - experts


def padding_for(gate: Gate, rows_A: int, elements: int) -> int:
    """Columns that pad z to a multiple of 8, where products with an x of many elements are fastest.

    None where they would take more memory than saving the mix and the gate weights would.
    """
    if gate.num_experts == 1 or elements < _MANY:
        return 0
    padding = -(rows_A + gate.num_experts) % 8
    return padding if padding <= min(rows_A, gate.num_experts + gate.r) else 0


_MANY = 2**15  # chosen on an Intel Xeon, and only a matter of speed


def gated(z_TP: Tensor, gate: Gate) -> Tensor:
    """u (T, U), in the dtype of z."""
    if gate.num_experts == 1:
        return z_TP
    if z_TP.is_cuda and (kernels := kernels_for(z_TP, gate)):
        return kernels.gate_forward(z_TP, gate.share, gate.num_experts, gate.r, gate.temperature)
    h, logits_T1N = _parts(_wide(z_TP), gate)
    u_TU = _mixed(h, functional.gate_weights(logits_T1N, gate.temperature), gate).squeeze(1)
    return u_TU if u_TU.dtype == z_TP.dtype else u_TU.to(z_TP.dtype)


def gated_without_gradients(z_T1P: Tensor, gate: Gate) -> Tensor:
    """`gated` for one position, (T, 1, P) → (T, 1, U), outside of training."""
    if gate.num_experts == 1:
        return z_T1P
    if z_T1P.is_cuda and (kernels := kernels_for(z_T1P, gate._replace(balance=0.0))):
        z_TP = z_T1P.squeeze(1)
        u_TU: Tensor = kernels.gate_forward(z_TP, gate.share, gate.num_experts, gate.r, gate.temperature)
        return u_TU.unsqueeze(1)
    h, logits_T1N = _parts(_wide(z_T1P), gate)
    u_T1U = _mixed(h, functional.gate_weights(logits_T1N, gate.temperature), gate)
    return u_T1U if u_T1U.dtype == z_T1P.dtype else u_T1U.to(z_T1P.dtype)


def gated_backward(
    du_TU: Tensor,
    z_TP: Tensor,
    scaling: float,
    gate: Gate,
    careful: bool = False,
    balance: Attachment | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz (T, P), s·u (T, U)) from the gradient of s·u (T, U), which is overwritten unless `careful`."""
    if gate.num_experts == 1:
        return du_TU * scaling if careful else du_TU.mul_(scaling), z_TP * scaling
    if careful:
        return _gated_derivative(du_TU, z_TP, scaling, gate, balance)
    if z_TP.is_cuda and (kernels := kernels_for(z_TP, gate)):
        return kernels.gate_backward(
            du_TU, z_TP, gate.share, gate.num_experts, gate.r, gate.temperature, scaling
        )
    wide_TP = _wide(z_TP)
    h, logits_T1N = _parts(wide_TP, gate)
    w_T1N = functional.gate_weights(logits_T1N, gate.temperature)
    su_TU = _mixed(h, w_T1N, gate).squeeze(1).mul_(scaling)
    du_TU = (du_TU if du_TU.dtype == wide_TP.dtype else du_TU.to(wide_TP.dtype)).mul_(scaling)
    dh_TG, dw_T1N = _mixed_backward(du_TU, h, w_T1N, gate)
    if balance is not None:
        dw_T1N = dw_T1N + balance.gradient(w_T1N.squeeze(1)).unsqueeze(1)
    dlogits_T1N = torch._softmax_backward_data(dw_T1N, w_T1N, 2, w_T1N.dtype)
    if gate.temperature != 1.0:
        dlogits_T1N = dlogits_T1N / gate.temperature
    tokens, columns = z_TP.shape
    parts = [dh_TG, dlogits_T1N.view(tokens, gate.num_experts)]
    if padding := columns - dh_TG.shape[1] - gate.num_experts:
        parts.append(wide_TP.new_zeros(tokens, padding))
    dz_TP = torch.cat(parts, 1)
    if dz_TP.dtype == z_TP.dtype:
        return dz_TP, su_TU
    return dz_TP.to(z_TP.dtype), su_TU.to(z_TP.dtype)


def _gated_derivative(
    du_TU: Tensor, z_TP: Tensor, scaling: float, gate: Gate, balance: Attachment | None
) -> tuple[Tensor, Tensor]:
    """`gated_backward` where it must be careful."""
    G, experts, padding = gate.sizes(z_TP.shape[1])
    h_TG, w_TN = z_TP[:, :G], functional.gate_weights(z_TP[:, G : G + experts], gate.temperature)
    su_TU = (functional.mix(h_TG, w_TN, gate.share) * scaling).to(z_TP.dtype)
    dh_TG, dw_TN = functional.mix_backward(du_TU.to(w_TN.dtype) * scaling, h_TG, w_TN, gate.share)
    if balance is not None:
        dw_TN = dw_TN + balance.gradient(w_TN)
    wdw_TN = w_TN * dw_TN
    dlogits_TN = torch.addcmul(wdw_TN, w_TN, wdw_TN.sum(-1, keepdim=True), value=-1.0)
    if gate.temperature != 1.0:
        dlogits_TN = dlogits_TN / gate.temperature
    parts = [dh_TG.to(z_TP.dtype), dlogits_TN.to(z_TP.dtype)]
    if padding:
        parts.append(z_TP.new_zeros(z_TP.shape[0], padding))
    return torch.cat(parts, 1), su_TU


def _wide(z: Tensor) -> Tensor:
    """z in float32 if it has 16 bits: softmax and sums are computed in no less."""
    return z if z.element_size() > 2 else z.float()


def _parts(z: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """h (T, N, R), or (T, 1, R) if A is shared, and the logits (T, 1, N), as views of z (T, P) or (T, 1, P)."""
    z = z.contiguous()
    tokens, *_, columns = z.shape
    (G, experts, _), r = gate.sizes(columns), gate.r
    h = z.as_strided((tokens, G // r, r), (columns, r, 1))
    return h, z.as_strided((tokens, 1, experts), (columns, experts, 1), z.storage_offset() + G)


def _mixed(h: Tensor, w_T1N: Tensor, gate: Gate) -> Tensor:
    """`functional.mix` (T, 1, U) of h and w as `_parts` has them; as one operation, equal up to rounding, for most."""
    if gate.share == "B":
        return torch.bmm(w_T1N, h)
    tokens, _, experts = w_T1N.shape
    if gate.share in ("A", "none"):
        return (w_T1N.view(tokens, experts, 1) * h).view(tokens, 1, experts * gate.r)
    return functional.mix(h.view(tokens, h.shape[1] * gate.r), w_T1N.squeeze(1), gate.share).unsqueeze(1)


def _mixed_backward(du_TU: Tensor, h: Tensor, w_T1N: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Gradients of `_mixed` with respect to h (T, G) and w (T, 1, N); as one operation each for most.

    They equal those of `functional.mix_backward` up to rounding.
    """
    (tokens, _, experts), r = w_T1N.shape, gate.r
    if gate.share == "B":
        du_T1R = du_TU.unsqueeze(1)
        dh_TNR = w_T1N.view(tokens, experts, 1) * du_T1R
        return dh_TNR.view(tokens, experts * r), torch.bmm(du_T1R, h.mT)
    if gate.share == "A":
        du_TNR = du_TU.view(tokens, experts, r)
        return torch.bmm(w_T1N, du_TNR).squeeze(1), torch.bmm(h, du_TNR.mT)
    h_TG = h.view(tokens, h.shape[1] * r)
    dh_TG, dw_TN = functional.mix_backward(du_TU, h_TG, w_T1N.squeeze(1), gate.share)
    return dh_TG, dw_TN.unsqueeze(1)


def kernels_for(z_TP: Tensor, gate: Gate) -> ModuleType | None:
    """The CUDA kernels of the gate, where they apply.

    The balance loss needs a mean over all tokens, float64 more digits than they have, an observer of single operations
    would not see them, and they know the sharing schemes that they list.
    """
    if z_TP.is_cuda and not gate.balance and z_TP.dtype != torch.float64 and not is_observed():
        kernels = _triton_gate()
        return kernels if kernels is not None and gate.share in kernels.SHARES else None
    return None


@functools.cache
def _triton_gate() -> ModuleType | None:
    # torch for CUDA on Linux comes with Triton; without it plain operations compute the same.
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("braidlora.adapters._triton_gate")

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
from braidlora.adapters.sharing import SCHEMES


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
        G = self.r * experts if "A" in SCHEMES[self.share].per_expert else self.r
        return G, experts, columns - G - experts


def padding_for(gate: Gate, rows_A: int) -> int:
    """Columns that pad z to a multiple of 8, where matrix products are fastest.

    None where they would take more memory than saving the mix and the gate weights would.
    """
    padding = -(rows_A + gate.num_experts) % 8
    return padding if gate.num_experts > 1 and padding <= min(rows_A, gate.num_experts + gate.r) else 0


def gated(z_TP: Tensor, gate: Gate) -> Tensor:
    """u (T, U), in the dtype of z."""
    if gate.num_experts == 1:
        return z_TP
    if z_TP.is_cuda and (kernels := kernels_for(z_TP, gate)):
        return kernels.gate_forward(z_TP, gate.share, gate.num_experts, gate.r, gate.temperature)
    h_TG, logits_TN, _ = z_TP.split_with_sizes(gate.sizes(z_TP.shape[1]), 1)
    w_TN = functional.gate_weights(logits_TN, gate.temperature)
    return _in_dtype_of(z_TP, _mixed(h_TG, w_TN, gate))


def gated_without_gradients(z_T1P: Tensor, gate: Gate, sizes: tuple[int, ...]) -> Tensor:
    """`gated` for one position, (T, 1, P) → (T, 1, U); z has h, the logits and the padding, of these sizes."""
    if gate.num_experts == 1:
        return z_T1P
    if z_T1P.is_cuda and (kernels := kernels_for(z_T1P, gate._replace(balance=0.0))):
        z_TP = z_T1P.squeeze(1)
        u_TU: Tensor = kernels.gate_forward(z_TP, gate.share, gate.num_experts, gate.r, gate.temperature)
        return u_TU.unsqueeze(1)
    h_T1G, logits_T1N, *_ = z_T1P.split_with_sizes(sizes, 2)
    w_T1N = functional.gate_weights(logits_T1N, gate.temperature)
    return _in_dtype_of(z_T1P, functional.mix_in_one(h_T1G, w_T1N, gate.share))


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
    wide_TP = functional.at_least_float32(z_TP)
    sizes = gate.sizes(z_TP.shape[1])
    h_TG, logits_TN, _ = wide_TP.split_with_sizes(sizes, 1)
    w_TN = functional.gate_weights(logits_TN, gate.temperature)
    su_TU = _mixed(h_TG, w_TN, gate).mul_(scaling)
    du_TU = (du_TU if du_TU.dtype == wide_TP.dtype else du_TU.to(wide_TP.dtype)).mul_(scaling)
    dh_TG, dw_TN = _mixed_backward(du_TU, h_TG, w_TN, gate)
    if balance is not None:
        dw_TN = dw_TN + balance.gradient(w_TN)
    dlogits_TN = torch._softmax_backward_data(dw_TN, w_TN, -1, w_TN.dtype)
    if gate.temperature != 1.0:
        dlogits_TN = dlogits_TN / gate.temperature
    parts = [dh_TG, dlogits_TN]
    if sizes[2]:
        parts.append(wide_TP.new_zeros(wide_TP.shape[0], sizes[2]))
    return _in_dtype_of(z_TP, torch.cat(parts, 1)), _in_dtype_of(z_TP, su_TU)


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


def _mixed(h_TG: Tensor, w_TN: Tensor, gate: Gate) -> Tensor:
    """`functional.mix` as one operation, equal up to rounding."""
    return functional.mix_in_one(h_TG.unsqueeze(1), w_TN.unsqueeze(1), gate.share).squeeze(1)


def _mixed_backward(du_TU: Tensor, h_TG: Tensor, w_TN: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """`functional.mix_backward` in one operation each, equal up to rounding; all in the dtype of w."""
    own, shape = SCHEMES[gate.share].per_expert, (w_TN.shape[0], gate.num_experts, gate.r)
    if len(own) == 1:
        per_TNR, shared_TR = (h_TG.view(shape), du_TU) if "A" in own else (du_TU.view(shape), h_TG)
        dw_TN = torch.bmm(per_TNR, shared_TR.unsqueeze(2)).squeeze(2)
        if "B" in own:
            return torch.bmm(w_TN.unsqueeze(1), per_TNR).squeeze(1), dw_TN
        return (w_TN.unsqueeze(2) * du_TU.unsqueeze(1)).view(h_TG.shape), dw_TN
    return functional.mix_backward(du_TU, h_TG, w_TN, gate.share)


def _in_dtype_of(z: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == z.dtype else tensor.to(z.dtype)


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

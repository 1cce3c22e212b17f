"""Any adapter of braidlora as one shrink and one expand matrix, the form in which a server holds a LoRA.

A server computes `y += expand · (shrink · x)` with matrices of a fixed rank R for all adapters. With the gate of
`gate.py` between the two, this holds a token-routed adapter of any sharing scheme:

                     N·r rows        unused     N rows
    shrink (R, k) = [ A_1; …; A_N ;   0 … 0  ;  W_g/τ ]        a shared A is repeated
    expand (d, R) = s·[ B_1 … B_N ,   0 … 0  ,  0     ]        a shared B is repeated

    buffer (T, R) = x · shrinkᵀ;   w = softmax(last N columns);   column c of expert c // r is multiplied by w[c // r]

so y += s·Σᵢ wᵢ Bᵢ Aᵢ x, which is every scheme. A module of smaller rank than r leaves columns of its blocks zero.
The router is in the last rows so that the number of experts alone says where it is.

Scaling, temperature and patterns are folded in here, in float32, so that a server needs N and r of an adapter and no
more. With N = 1, or with equal weights for all experts, the result is a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from braidlora.adapters.functional import static_factors
from braidlora.adapters.sharing import SCHEMES
from braidlora.errors import CheckpointError
from braidlora.serving.adapter_file import (
    FACTORED,
    MULTI,
    ROOT,
    AdapterFile,
    Layout,
    layout_of,
    split_name,
)

Factors = dict[str, Tensor]


def group(tensors: Iterable[tuple[str, Tensor]], kind: str, path: Path) -> dict[str, Factors]:
    """A state dict as {module: {factor: tensor}}.

    Raises:
        CheckpointError: a tensor is none of the adapter's factors, or is not finite.
    """
    modules: dict[str, Factors] = {}
    for name, tensor in tensors:
        module, factor = split_name(name, kind, path)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} contains NaN or infinity.")
        modules.setdefault(module, {})[factor] = tensor
    return modules


def layout(config: AdapterFile, modules: Mapping[str, Factors], path: Path) -> Layout:
    """As `layout_of`, of tensors."""
    shapes = {
        module: {factor: tuple(tensor.shape) for factor, tensor in factors.items()}
        for module, factors in modules.items()
    }
    return layout_of(config, shapes, path)


def encode(
    config: AdapterFile, modules: Mapping[str, Factors], where: Layout, rank: int | None = None
) -> dict[str, Tensor]:
    """The state dict of a LoRA with scaling 1 that holds the adapter, under PEFT's names, in float32.

    Args:
        config: of the adapter.
        modules: as `group` returns them.
        where: as `layout` returns it.
        rank: R of the server. A token-routed adapter fills it exactly; a plain LoRA may be smaller and keeps its rank.
    """
    encoded = {}
    for module, factors in modules.items():
        scaling = config.scaling_of(module)
        if config.peft_type == FACTORED:
            shrink, expand = _factored(factors, scaling)
        elif config.routed:
            assert rank is not None
            shrink, expand = encode_module(
                factors["braidlora_A"], factors["braidlora_router"], factors["braidlora_B"],
                share=config.share, temperature=config.router_temperature, scaling=scaling, where=where, rank=rank,
            )  # fmt: skip
        elif config.peft_type == MULTI:
            w_N = torch.full((config.num_experts,), 1 / config.num_experts)
            shrink, expand = static_factors(factors["braidlora_A"], factors["braidlora_B"], w_N, config.share)
            shrink, expand = shrink.float(), expand.float() * scaling
        else:
            shrink, expand = factors["lora_A"].float(), factors["lora_B"].float() * scaling
        encoded[f"{ROOT}{module}.lora_A.weight"] = shrink
        encoded[f"{ROOT}{module}.lora_B.weight"] = expand
    return encoded


def encode_module(
    A: Tensor,
    router: Tensor,
    B: Tensor,
    *,
    share: str,
    temperature: float,
    scaling: float,
    where: Layout,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Shrink matrix (R, k) and expand matrix (d, R) of one token-routed module.

    Args:
        A: (N·r', k), or (r', k) if it is shared, with r' ≤ r of the layout.
        router: (N, k).
        B: (d, N·r'), or (d, r') if it is shared.
        share: the scheme.
        temperature: τ of the router's softmax.
        scaling: s of this module.
        where: N and r of the adapter.
        rank: R of the server, at least `where.columns`.
    """
    n, r = where.num_experts, where.r
    assert rank >= where.columns
    blocks_A, blocks_B = SCHEMES[share].blocks(n)
    own = A.shape[0] // blocks_A
    shrink = torch.zeros(rank, A.shape[1])
    expand = torch.zeros(B.shape[0], rank)
    # Views with an axis for the experts; assignment repeats a shared block.
    shrink[: n * r].view(n, r, -1)[:, :own] = A.float().view(blocks_A, own, -1)
    expand[:, : n * r].view(-1, n, r)[..., :own] = (B.float() * scaling).view(-1, blocks_B, own)
    shrink[rank - n :] = router.float() / temperature
    return shrink, expand


def _factored(factors: Factors, scaling: float) -> tuple[Tensor, Tensor]:
    """A' = M A (m, k) and B' = s·(B_base + B2 B1) (d, m) of a factored LoRA; see `FactoredLoraLayer`."""
    A, M, B1, B2, base = (factors[f"factoredlora_{name}"].double() for name in ("A", "M", "B1", "B2", "base"))
    return (M @ A).float(), ((base + B2 @ B1) * scaling).float()

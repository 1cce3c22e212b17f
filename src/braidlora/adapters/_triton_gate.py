"""The gate on CUDA as one kernel each for forward and backward, instead of about twenty launches on small tensors.

Both read z (T, P) = [h (T, G) | logits (T, N) | padding] row by row, in float32 whatever the dtype. One program takes
BLOCK_T tokens; the experts are unrolled, and tiles of r and of N columns are padded to powers of two.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from braidlora.adapters.functional import stacked_ranks
from braidlora.adapters.sharing import SCHEMES

BLOCK_T = 32
SHARES = ("B", "A", "none")  # the schemes that the kernels know; other gates are computed without them


@triton.jit
def _softmax_tile(  # type: ignore[no-untyped-def]
    z, row, in_t, G, N: tl.constexpr, N_TILE: tl.constexpr, inverse_temperature
):  # fmt: skip
    column = tl.arange(0, N_TILE)
    logits = tl.load(
        z + row[:, None] + G + column[None, :],
        mask=in_t[:, None] & (column < N)[None, :],
        other=-float("inf"),
    )
    logits = tl.where(in_t[:, None], logits.to(tl.float32) * inverse_temperature, 0.0)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    z, u, T, P, U, inverse_temperature,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, N_TILE: tl.constexpr, R_TILE: tl.constexpr,
    H_STEP: tl.constexpr, U_STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_t = t < T
    row = t.to(tl.int64) * P
    expert, j = tl.arange(0, N_TILE), tl.arange(0, R_TILE)
    tile = in_t[:, None] & (j < R)[None, :]
    w = _softmax_tile(z, row, in_t, G, N, N_TILE, inverse_temperature)
    mixed = tl.zeros((BLOCK, R_TILE), tl.float32)
    for i in tl.static_range(N):
        w_i = tl.sum(tl.where((expert == i)[None, :], w, 0.0), 1)
        h_i = tl.load(z + row[:, None] + i * H_STEP + j[None, :], mask=tile, other=0.0).to(tl.float32)
        if U_STEP == 0:
            mixed += w_i[:, None] * h_i
        else:
            out = u + t.to(tl.int64)[:, None] * U + i * U_STEP + j[None, :]
            tl.store(out, (w_i[:, None] * h_i).to(u.dtype.element_ty), mask=tile)
    if U_STEP == 0:
        tl.store(u + t.to(tl.int64)[:, None] * U + j[None, :], mixed.to(u.dtype.element_ty), mask=tile)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    z, du, dz, su, T, P, U, scaling, inverse_temperature,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, N_TILE: tl.constexpr, R_TILE: tl.constexpr,
    H_STEP: tl.constexpr, U_STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_t = t < T
    row, row_u = t.to(tl.int64) * P, t.to(tl.int64) * U
    expert, j = tl.arange(0, N_TILE), tl.arange(0, R_TILE)
    tile = in_t[:, None] & (j < R)[None, :]
    w = _softmax_tile(z, row, in_t, G, N, N_TILE, inverse_temperature)
    dw = tl.zeros((BLOCK, N_TILE), tl.float32)
    mixed = tl.zeros((BLOCK, R_TILE), tl.float32)  # s·u where B is shared
    dh = tl.zeros((BLOCK, R_TILE), tl.float32)  # where A is shared
    for i in tl.static_range(N):
        w_i = scaling * tl.sum(tl.where((expert == i)[None, :], w, 0.0), 1)[:, None]
        h_i = tl.load(z + row[:, None] + i * H_STEP + j[None, :], mask=tile, other=0.0).to(tl.float32)
        du_i = tl.load(du + row_u[:, None] + i * U_STEP + j[None, :], mask=tile, other=0.0).to(tl.float32)
        dw += tl.where((expert == i)[None, :], tl.sum(h_i * du_i, 1)[:, None], 0.0)
        if U_STEP == 0:
            mixed += w_i * h_i
        else:
            out = su + row_u[:, None] + i * U_STEP + j[None, :]
            tl.store(out, (w_i * h_i).to(su.dtype.element_ty), mask=tile)
        if H_STEP == 0:
            dh += w_i * du_i
        else:
            out = dz + row[:, None] + i * H_STEP + j[None, :]
            tl.store(out, (w_i * du_i).to(dz.dtype.element_ty), mask=tile)
    if U_STEP == 0:
        tl.store(su + row_u[:, None] + j[None, :], mixed.to(su.dtype.element_ty), mask=tile)
    if H_STEP == 0:
        tl.store(dz + row[:, None] + j[None, :], dh.to(dz.dtype.element_ty), mask=tile)
    # This zeroes the columns of padding: w is zero beyond N.
    dlogits = scaling * inverse_temperature * w * (dw - tl.sum(w * dw, 1)[:, None])
    out = dz + row[:, None] + G + expert[None, :]
    tl.store(out, dlogits.to(dz.dtype.element_ty), mask=in_t[:, None] & (G + expert < P)[None, :])


@functools.lru_cache(maxsize=256)  # every layer asks for them twice in a step
def _tiles(
    tokens: int, columns: int, share: str, experts: int, r: int
) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, columns of u, and the kernels' constants."""
    G, U = stacked_ranks(share, experts, r)
    own = SCHEMES[share].per_expert
    constants = {
        "G": G, "N": experts, "R": r, "N_TILE": triton.next_power_of_2(columns - G),
        "R_TILE": triton.next_power_of_2(r), "H_STEP": r if "A" in own else 0,
        "U_STEP": r if "B" in own else 0, "BLOCK": BLOCK_T,
    }  # fmt: skip
    return (triton.cdiv(tokens, BLOCK_T),), U, constants


def gate_forward(z_TP: Tensor, share: str, experts: int, r: int, temperature: float) -> Tensor:
    """u (T, U), the gated h, in the dtype of z."""
    grid, U, constants = _tiles(*z_TP.shape, share, experts, r)
    u_TU = z_TP.new_empty(z_TP.shape[0], U)
    if z_TP.shape[0]:
        with torch.cuda.device_of(z_TP):
            _forward[grid](z_TP, u_TU, *z_TP.shape, U, 1.0 / temperature, **constants)
    return u_TU


def gate_backward(
    du_TU: Tensor, z_TP: Tensor, share: str, experts: int, r: int, temperature: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """(dz (T, P), s·u (T, U)) from the gradient of s·u, not yet scaled."""
    grid, U, constants = _tiles(*z_TP.shape, share, experts, r)
    dz_TP, su_TU = torch.empty_like(z_TP), torch.empty_like(du_TU)
    if z_TP.shape[0]:
        with torch.cuda.device_of(z_TP):
            _backward[grid](
                z_TP, du_TU, dz_TP, su_TU, *z_TP.shape, U, scaling, 1.0 / temperature, **constants
            )
    return dz_TP, su_TU

"""Sums of products: stacked, dense, decomposed."""

import numpy as np
import pytest
import torch

from braidlora.federated.protocol.low_rank import ProductSum, with_orthonormal_rows


def pair(d, k, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((d, r), (r, k)))


@pytest.mark.parametrize(("d", "k"), [(20, 12), (12, 20)])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0, 100.0])
def test_stacked_and_dense_forms_are_the_same_sum(d, k, limit):
    products, W = ProductSum(dense_above=limit), torch.zeros(d, k, dtype=torch.float64)
    for i, r in enumerate([2, 3, 4, 5]):
        B, A = pair(d, k, r, i)
        products.add(B, A, 0.3 * i + 0.1)
        W += (0.3 * i + 0.1) * B @ A
    B, A = products.factors()
    torch.testing.assert_close(B @ A, W)
    assert B.shape[1] == A.shape[0] == (14 if limit == 100.0 else 12)
    U, S, Vh = products.svd()
    torch.testing.assert_close((U * S) @ Vh, W)
    assert (S.diff() <= 0).all()
    np.testing.assert_allclose(S[:12].numpy(), np.linalg.svd(W.numpy())[1], atol=1e-12)
    for Q in (U, Vh.mT):
        torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1], dtype=torch.float64))


def test_memory_stops_growing_once_dense():
    products = ProductSum(dense_above=0.5)
    for i in range(50):
        products.add(*pair(20, 12, 3, i), 1.0)
    assert products._dense.shape == (20, 12)
    assert products._A == products._B == []
    assert products.rank == 150


def test_the_sum_is_a_copy():
    products = ProductSum(dense_above=1.0)
    B, A = pair(20, 12, 3, 0)
    W = B @ A
    products.add(B, A, 1.0)
    A.zero_()
    B.zero_()
    torch.testing.assert_close(torch.matmul(*products.factors()), W)


def test_16_bit_factors_are_summed_in_float32():
    products = ProductSum(dense_above=1.0)
    products.add(torch.ones(4, 1, dtype=torch.float16), torch.ones(1, 4, dtype=torch.bfloat16), 1e6)
    B, A = products.factors()
    assert B.dtype == A.dtype == torch.float32
    assert (B @ A)[0, 0].item() == 1e6


def test_rows_beyond_the_width_are_zero_however_often_they_are_asked_for():
    V = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q.mT
    wide = with_orthonormal_rows(V, 14)
    assert torch.equal(with_orthonormal_rows(wide, 17), torch.cat([wide, torch.zeros(3, 10)]))


@pytest.mark.parametrize(("rows", "orthonormal"), [(3, 3), (5, 5), (10, 10), (14, 10)])
def test_further_orthonormal_rows(rows, orthonormal):
    V = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q.mT
    full = with_orthonormal_rows(V, rows)
    assert full.shape == (rows, 10)
    torch.testing.assert_close(full[:4], V[:rows])
    expected = torch.zeros(rows, dtype=torch.float64)
    expected[:orthonormal] = 1.0
    torch.testing.assert_close(full @ full.mT, torch.diag(expected))
    assert torch.equal(full, with_orthonormal_rows(V, rows)), "the same rows for the same V"

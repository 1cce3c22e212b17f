"""The arithmetic of the probe against dense float64 NumPy."""

import numpy as np
import pytest
import torch

from braidlora.advisor.measures import (
    as_matrix,
    column_similarity,
    cosines,
    moment_cosines,
    second_moment,
    update_products,
)

T, R, K, D = 3, 4, 11, 9


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, R, K, generator=generator), torch.randn(T, D, R, generator=generator)


def test_products_of_updates_are_those_of_dense_matrices(factors):
    A, B = factors
    dense = [(B[t].double() @ A[t].double()).numpy().ravel() for t in range(T)]
    expected = np.array([[one @ other for other in dense] for one in dense])
    np.testing.assert_allclose(update_products(A, B).numpy(), expected, rtol=1e-12)
    norms = np.sqrt(np.diag(expected))
    found = cosines(update_products(A, B)).numpy()
    np.testing.assert_allclose(found, expected / np.outer(norms, norms), rtol=1e-12)


def test_similarity_of_columns_is_that_of_projections(factors):
    _, B = factors
    found, chance = column_similarity(list(B))
    projections = [one.double().numpy() @ np.linalg.pinv(one.double().numpy()) for one in B]
    expected = [[np.trace(one @ other) / R for other in projections] for one in projections]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert chance == R / D


def test_zero_has_no_column_space(factors):
    _, B = factors
    assert column_similarity([B[0], torch.zeros(D, R)]) is None


def test_second_moments_leave_padding_out():
    z = torch.randn(2, 5, R, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows = np.concatenate([z[0, :3].double().numpy(), z[1].double().numpy()])
    np.testing.assert_allclose(second_moment(z, mask).numpy(), rows.T @ rows, rtol=1e-12)


def test_cosines_of_moments_compare_tasks_and_halves():
    generator = torch.Generator().manual_seed(2)
    halves = [
        torch.stack([m.T @ m for m in torch.randn(T, 6, R, generator=generator).double()]) for _ in "12"
    ]

    def cosine(one, other):
        return float((one * other).sum() / (one.norm() * other.norm()))

    whole = halves[0] + halves[1]
    found = moment_cosines(*halves)
    for t in range(T):
        for u in range(T):
            expected = cosine(halves[0][t], halves[1][t]) if t == u else cosine(whole[t], whole[u])
            assert float(found[t, u]) == pytest.approx(expected, rel=1e-12)
    assert float(moment_cosines(halves[0], halves[0]).diagonal().min()) == pytest.approx(1.0)


def test_what_is_not_a_number_is_none():
    assert as_matrix(torch.tensor([[1.0, float("nan")]])) == [[1.0, None]]

"""Subspaces against scipy, against chance, and where there is none."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from braidlora.analysis.change import matrix_change, update_change
from braidlora.analysis.subspaces import angles, chance, column_space, similarity


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("r", "s"), [(8, 8), (3, 8), (1, 5), (8, 40)])
def test_angles_are_scipys(r, s):
    X, Y = random(64, r, seed=1), random(64, s, seed=2)
    Y[:, 0] = X[:, 0] + 1e-3 * random(64, seed=3)  # one angle is small
    expected = np.rad2deg(subspace_angles(X.numpy(), Y.numpy()))[::-1]
    found = column_space(X), column_space(Y)
    np.testing.assert_allclose(angles(*found), expected, atol=1e-9)
    cosines = np.cos(np.deg2rad(expected))
    assert similarity(*found) == pytest.approx(np.mean(cosines**2), abs=1e-13)


@pytest.mark.parametrize(("n", "r", "s"), [(64, 4, 4), (64, 4, 16)])
def test_random_subspaces_meet_the_chance_level(n, r, s):
    pairs = [
        (column_space(random(n, r, seed=2 * i)), column_space(random(n, s, seed=2 * i + 1)))
        for i in range(400)
    ]
    mean = np.mean([similarity(*pair) for pair in pairs])
    assert chance(*pairs[0]) == s / n
    assert mean == pytest.approx(s / n, rel=0.05)


def test_only_the_subspace_counts():
    X, Y = random(32, 4, seed=1), random(32, 4, seed=2)
    other_basis = random(4, 4, seed=3)
    expected = similarity(column_space(X), column_space(Y))
    assert similarity(column_space(X @ other_basis), column_space(Y)) == pytest.approx(expected, abs=1e-12)
    assert similarity(column_space(X), column_space(-3 * X @ other_basis)) == pytest.approx(1.0, abs=1e-12)
    rotation, _ = torch.linalg.qr(random(32, 32, seed=4))
    rotated = similarity(column_space(rotation @ X), column_space(rotation @ Y))
    assert rotated == pytest.approx(expected, abs=1e-12)
    X[:, 3] = Y[:, :3] @ random(3, seed=5)
    assert similarity(column_space(X[:, 3:]), column_space(Y)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_rank(dtype):
    full, thin = random(512, 8, seed=1), random(512, 3, seed=2) @ random(3, 8, seed=3)
    assert column_space(full.to(dtype)).rank == 8
    assert column_space(thin.to(dtype)).reason == "rank 3, not 8"
    assert column_space(thin.to(dtype), rank=3).rank == 3
    narrow = full * torch.logspace(0, -1, 8, dtype=torch.float64)  # a spectrum that trained B's have
    assert column_space(narrow.to(dtype)).rank == 8


def test_zero_has_no_subspace():
    space = column_space(torch.zeros(16, 4))
    assert space.basis is None
    assert space.reason == "all zero"


def test_a_rank_above_the_width_is_the_whole_space():
    space = column_space(random(6, 8))
    assert space.rank == 6
    assert similarity(space, column_space(random(6, 2, seed=1))) == pytest.approx(1.0)
    assert chance(space, column_space(random(6, 2, seed=1))) == 1.0


def reference(X, Y):
    """Column by column, in numpy."""
    X, Y = X.numpy(), Y.numpy()
    norms = [(np.linalg.norm(x), np.linalg.norm(y)) for x, y in zip(X.T, Y.T, strict=True)]
    cosines = [x @ y / (a * b) for x, y, (a, b) in zip(X.T, Y.T, norms, strict=True)]
    magnitude = sum(abs(b - a) for a, b in norms) / sum(a for a, _ in norms)
    return magnitude, np.mean(1 - np.array(cosines))


def test_the_change_of_a_matrix_is_column_by_column():
    X, Y = random(8, 40, seed=1), random(8, 40, seed=2)
    change = matrix_change(X, Y)
    magnitude, direction = reference(X, Y)
    assert change.magnitude == pytest.approx(magnitude, abs=1e-14)
    assert change.direction == pytest.approx(direction, abs=1e-14)
    assert change.norm_before == pytest.approx(float(torch.linalg.norm(X)))
    assert change.norm_after == pytest.approx(float(torch.linalg.norm(Y)))


def test_the_change_of_an_update_is_that_of_the_product():
    A0, B0, A1, B1 = (
        random(4, 40, seed=1),
        random(30, 4, seed=2),
        random(4, 40, seed=3),
        random(30, 4, seed=4),
    )
    change = update_change((A0, B0), (A1, B1), scaling=2.0)
    magnitude, direction = reference(2 * B0 @ A0, 2 * B1 @ A1)
    assert change.magnitude == pytest.approx(magnitude, abs=1e-13)
    assert change.direction == pytest.approx(direction, abs=1e-13)
    assert change.norm_after == pytest.approx(float(torch.linalg.norm(2 * B1 @ A1)))


def test_growing_alone_turns_nothing():
    X = random(8, 40)
    change = matrix_change(X, 1.5 * X)
    assert change.magnitude == pytest.approx(0.5)
    assert change.direction == pytest.approx(0.0, abs=1e-15)
    assert matrix_change(X, -X).direction == pytest.approx(2.0)


def test_from_zero_there_is_neither():
    change = matrix_change(torch.zeros(8, 4), random(8, 4))
    assert change.magnitude is None
    assert change.direction is None
    assert change.norm_after > 0

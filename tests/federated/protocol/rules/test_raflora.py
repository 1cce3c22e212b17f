"""raFLoRA: levels, what a level without clients keeps, and factors that can be trained."""

import numpy as np
import pytest
import torch
from synthetic import best_of_rank, by_rank, clients, get, layers, run

from braidlora.errors import ConfigError
from braidlora.federated import get_rule

SHAPES = [(14, 12), (9, 16)]
RANKS = [2, 5, 1, 3]


def product(state, layer):
    return get(state, layer, "lora_B") @ get(state, layer, "lora_A")


def dense(made, layer):
    return by_rank(made, *([get(one.state, layer, f"lora_{f}") for one in made] for f in "BA"))


@pytest.mark.parametrize("levels", [None, RANKS, [1, 2, 3, 4, 5]])
def test_levels_change_memory_only(levels):
    made = clients("raflora", RANKS, SHAPES, scaling=[1.0, 2.0, 0.5, 4.0])
    shared = run(get_rule("raflora", levels=levels), made)
    for layer in layers(made[0].state):
        np.testing.assert_allclose(product(shared, layer), dense(made, layer), atol=1e-10)


def test_with_equal_ranks_it_is_flexlora_with_the_singular_values_split_evenly():
    made = clients("raflora", [3] * 4, SHAPES)
    one, other = run(get_rule("raflora", max_rank=3), made), run(get_rule("flexlora", max_rank=3), made)
    for layer in layers(made[0].state):
        np.testing.assert_allclose(product(one, layer), product(other, layer), atol=1e-10)
        lengths = [
            np.linalg.norm(get(one, layer, f"lora_{f}"), axis=axis) for f, axis in (("B", 0), ("A", 1))
        ]
        np.testing.assert_allclose(*lengths, atol=1e-10)


@pytest.mark.parametrize("levels", [None, RANKS])
def test_a_level_that_nobody_has_keeps_its_directions(levels):
    rule = get_rule("raflora", levels=levels, max_rank=5)
    made = clients("raflora", RANKS, SHAPES)
    first = run(rule, made)
    low = [one for one in made if one.rank <= 2]
    second = run(rule, low, first)
    for layer in layers(made[0].state):
        kept = get(first, layer, "lora_B")[:, 2:] @ get(first, layer, "lora_A")[2:]
        wanted = dense(low, layer) + kept
        np.testing.assert_allclose(product(second, layer), best_of_rank(wanted, 5), atol=1e-9)


@pytest.mark.parametrize("levels", [None, [2, 8]])
def test_every_rank_of_a_client_can_be_trained(levels):
    """Where the aggregate has fewer directions than the client has ranks, A has rows and B is zero."""
    rule = get_rule("raflora", levels=levels, max_rank=8)
    made = clients("raflora", [2, 2], SHAPES)
    shared = run(rule, made)
    for layer in layers(made[0].state):
        payload = rule.payload_for(shared, 8, 2.0)
        A, B = get(payload, layer, "lora_A"), get(payload, layer, "lora_B")
        assert (np.linalg.norm(A, axis=1) > 0.1).all()
        np.testing.assert_allclose(2.0 * B @ A, dense(made, layer), atol=1e-10)
        Q = A / np.linalg.norm(A, axis=1, keepdims=True)
        np.testing.assert_allclose(Q @ Q.T, np.eye(8), atol=1e-8)


def test_without_max_rank_a_payload_of_a_higher_rank_is_extended():
    rule, made = get_rule("raflora"), clients("raflora", [2], SHAPES)
    shared = run(rule, made)
    for layer in layers(made[0].state):
        payload = rule.payload_for(shared, 6, 1.0)
        A = get(payload, layer, "lora_A")
        assert A.shape[0] == 6
        assert np.linalg.matrix_rank(A) == 6
        np.testing.assert_allclose(product(payload, layer), dense(made, layer), atol=1e-10)


def test_many_clients_become_dense_sums_by_level():
    made = clients("raflora", [1, 4] * 20, [(10, 8)])
    shared = run(get_rule("raflora", levels=[1, 4]), made)
    for layer in layers(made[0].state):
        np.testing.assert_allclose(product(shared, layer), dense(made, layer), atol=1e-9)


def test_levels_that_cannot_be():
    for levels in ([], [0, 3]):
        with pytest.raises(ConfigError, match="levels is"):
            get_rule("raflora", levels=levels)


def test_a_change_is_measured_in_what_the_client_was_sent():
    rule, made = get_rule("raflora", levels=RANKS, max_rank=5), clients("raflora", RANKS, SHAPES)
    before = run(rule, made)
    one = made[1]
    one.state |= rule.payload_for(before, one.rank, one.scaling)
    total = sum(
        float(torch.linalg.norm(value.B @ value.A)) for _, value in rule.change(one.update(rule), before)
    )
    assert total < 1e-9, "it sent back what it was sent"

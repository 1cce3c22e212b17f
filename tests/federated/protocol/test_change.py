"""What a client changed, and whether the round went its way: norms and cosines against dense matrices in float64."""

import math

import numpy as np
import pytest
import torch
from synthetic import AGGREGATING, ANY, EQUAL, HET, PRODUCTS, clients, get, layers, run

from braidlora.federated import get_rule
from braidlora.federated.protocol.change import Product, cosine, difference, extent, inner

SHAPES = [(14, 12), (9, 16)]
HEAD = "m.score.weight"


def norm(change):
    return extent(change.items() if isinstance(change, dict) else change).norm


def test_products_are_never_formed_but_measured_as_if_they_were():
    generator = torch.Generator().manual_seed(0)
    B1, A1, B2, A2 = (torch.randn(*size, generator=generator) for size in ((7, 3), (3, 5), (7, 2), (2, 5)))
    one, other = (
        {"x": Product(B1, A1), "h": torch.ones(2)},
        {"x": Product(B2, A2), "h": torch.full((2,), 3.0)},
    )
    dense = float(((B1 @ A1) * (B2 @ A2)).sum())
    assert inner(one["x"], other["x"]) == pytest.approx(dense, rel=1e-5)
    assert norm(one) == pytest.approx(math.sqrt(float((B1 @ A1).square().sum()) + 2.0), rel=1e-6)
    assert extent(one.items()).entries == 7 * 5 + 2
    assert extent(one.items()).size == pytest.approx(norm(one) / math.sqrt(37))
    assert extent([]).size == 0.0
    wanted = (dense + 6.0) / norm(one) / norm(other)
    assert cosine(one.items(), norm(one), other, norm(other)) == pytest.approx(wanted, rel=1e-5)
    assert cosine(one.items(), norm(one), one, norm(one)) == pytest.approx(1.0)
    opposite = {"x": Product(-B1, A1), "h": -torch.ones(2)}
    assert cosine(one.items(), norm(one), opposite, norm(one)) == pytest.approx(-1.0)
    assert cosine(one.items(), norm(one), {"x": Product(0 * B1, A1)}, 0.0) is None


def test_tensors_of_other_ranks_count_as_padded():
    small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert inner(small, large) == inner(large, small) == 11.0
    assert torch.equal(difference(large, small), torch.tensor([[2.0, 2.0], [5.0, 6.0]]))
    assert torch.equal(difference(small, large), torch.tensor([[-2.0, -2.0]]))
    assert torch.equal(difference(small, None), small)


@pytest.mark.parametrize("value", [1e30, 1e19, 1e-30])
def test_squares_beyond_float32(value):
    """The squares are not float32 numbers; the norm is."""
    assert norm({"x": torch.full((4,), value)}) == pytest.approx(2 * value, rel=1e-5)
    factor = torch.full((2, 2), math.sqrt(value / 2))
    assert norm({"x": Product(factor, factor)}) == pytest.approx(2 * value, rel=1e-5)


def dense_change(name, client, rule, before):
    """A client's change as one flat vector, and what the shared state's names are in it."""
    parts = {}
    for layer in layers(before):
        if name in PRODUCTS:
            W = client.scaling * get(client.state, layer, "lora_B") @ get(client.state, layer, "lora_A")
            if name != "flora":
                sent = rule.payload_for(before, client.rank, client.scaling)
                W = W - client.scaling * get(sent, layer, "lora_B") @ get(sent, layer, "lora_A")
            parts[layer] = W
        elif name == HET:
            parts[f"{layer}.factoredlora_base.weight"] = get(client.state, layer, "factoredlora_B2") @ get(
                client.state, layer, "factoredlora_B1"
            )
        else:
            for key in rule.outgoing(client.state, 1):
                if not key.startswith(layer):
                    continue
                mine = client.state[key].numpy()
                key = key.replace(".lora_", ".rest_") if name == "fedalt" else key
                start = before[key].double().numpy()
                change = np.zeros_like(start)
                cut = tuple(slice(size) for size in mine.shape)
                change[cut] = mine - start[cut]
                parts[key] = change
    return parts


@pytest.mark.parametrize("name", AGGREGATING)
def test_against_dense_changes(name):
    """In the second round, from a shared state that is not zero, and with a head."""
    ranks = [2, 5, 1, 3] if name in ANY else [3] * 4
    scaling = [0.5 + i for i in range(4)] if name in PRODUCTS else 2.0
    rule = get_rule(name, also_share=[HEAD])
    made = clients(name, ranks, SHAPES, scaling=scaling)
    generator = torch.Generator().manual_seed(1)
    for client in made:
        client.state[HEAD] = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    before = run(rule, made)
    for client in made:
        client.state = {
            n: t + torch.randn(t.shape, generator=generator).double() for n, t in client.state.items()
        }
    after = run(rule, made, before)
    plain = {n: t for n, t in before.items() if n != HEAD}
    names = list(dense_change(name, made[0], rule, plain))

    def whole(state):
        if name in PRODUCTS:
            return {layer: get(state, layer, "lora_B") @ get(state, layer, "lora_A") for layer in names}
        return {n: state[n].double().numpy() for n in names}

    moved = whole(after)
    if name != "flora":
        moved = {n: moved[n] - value for n, value in whole(before).items()}
    moved[HEAD] = (after[HEAD] - before[HEAD]).numpy()
    flat = np.concatenate([moved[n].ravel() for n in [*names, HEAD]])
    for client in made:
        change = {
            **dense_change(name, client, rule, plain),
            HEAD: (client.state[HEAD] - before[HEAD]).numpy(),
        }
        mine = np.concatenate([change[n].ravel() for n in [*names, HEAD]])
        got, whither = dict(rule.change(client.update(rule), before)), dict(rule.moved(before, after))
        assert norm(got) == pytest.approx(np.linalg.norm(mine), rel=1e-5)
        wanted = mine @ flat / np.linalg.norm(mine) / np.linalg.norm(flat)
        assert cosine(got.items(), norm(got), whither, norm(whither)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", EQUAL)
def test_what_has_no_common_start_counts_whole(name):
    """Independently drawn A in the first round."""
    rule, [client] = get_rule(name), clients(name, [3], SHAPES)
    update = client.update(rule)
    assert norm(rule.change(update, {})) == pytest.approx(
        math.sqrt(sum(float(t.square().sum()) for t in update.tensors.values()))
    )


def test_flexlora_small_changes_of_a_large_state_keep_their_digits():
    """In float32 the difference of two products would be all rounding."""
    rule, [client] = get_rule("flexlora"), clients("flexlora", [3], SHAPES, scaling=2.0)
    client.state = {n: 100.0 * t for n, t in client.state.items()}
    before = {n: t.float() for n, t in run(rule, [client]).items()}
    sent = {n: t.double() for n, t in rule.payload_for(before, 3, 2.0).items()}
    generator = torch.Generator().manual_seed(0)
    step = {n: 1e-3 * torch.randn(t.shape, generator=generator).double() for n, t in sent.items()}
    wanted = 0.0
    client.state = {n: (t + step[n]).float() for n, t in sent.items()}
    for layer in layers(sent):
        B, A = (client.state[f"{layer}.lora_{f}.weight"].double() for f in "BA")
        B0, A0 = (sent[f"{layer}.lora_{f}.weight"] for f in "BA")
        wanted += float((2.0 * (B @ A - B0 @ A0)).square().sum())
    assert norm(rule.change(client.update(rule), before)) == pytest.approx(math.sqrt(wanted), rel=1e-3)

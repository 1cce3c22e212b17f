"""Every federation option under every rule, through the server: it works, to the right value, or the recipe is refused.

A round here is all that happens to tensors in one: start, payload, what a client makes of it, its update, the guard,
the aggregate. Training is random noise. Expected values are formed densely in float64.
"""

import math
import random

import numpy as np
import pytest
from pydantic import ValidationError
from seven_clients import COUNT, HEAD, LAYERS, Round, recipe
from synthetic import HET, PRODUCTS, best_of_rank

from braidlora.config import FederationSection
from braidlora.federated import RULE_NAMES
from braidlora.federated.protocol.factors import AXES, split

pytestmark = pytest.mark.filterwarnings("ignore:federation.sample draws")

RANKS = [2, 4, 1, 3, 4, 2, 1]

OPTIONS = {
    "client_init": ["independent"],
    "wire": ["smallest"],
    "upload_dtype": ["float16", "bfloat16"],
    "robust": [
        {"aggregator": "norm-clip", "max_norm": 0.5},
        {"aggregator": "median"},
        {"aggregator": "trimmed-mean", "trim": 0.2},
        {"aggregator": "krum", "f": 1},
        {"aggregator": "multi-krum", "f": 1, "keep": 3},
    ],
    "sample": [{"number": 5}, {"fraction": 0.8}, {"number": 1}],
    "ranks": [RANKS],
    "r_intermediate": [3],
    "weights": ["steps", "uniform"],
    "padding": ["by-rank"],
    "share_cap": [0.3],
    "change_cap": [None, 50.0],
    "share_head": [True],
    "state": ["reset-each-round"],
    "optimizer_state": ["keep"],
    "min_clients": [3],
    "quorum": [0.5],
    "proximal_mu": [0.1],
    "server_momentum": [0.9],
    "server_learning_rate": [0.5],
    "scalings": [[1.0 + i for i in range(COUNT)]],  # alpha of each client
}  # fmt: skip
# What does not concern the tensors that travel.
ELSEWHERE = {
    "rule",
    "rounds",
    "clients",
    "partition",
    "local",
    "retries",
    "evaluate_every",
    "evaluate_sample",
    "keep_rounds",
    "lr_schedule",
    "common_test",
    "workers",
    "privacy",  # in test_privacy.py
}


def shares(federation, updates):
    """p_i, with the cap by bisection."""
    numbers = np.array(
        [
            {"rows": one.num_examples, "steps": one.steps, "uniform": 1}[federation.weights]
            for one in updates.values()
        ],
        dtype=float,
    )
    if federation.share_cap is not None and numbers.max() / numbers.sum() > federation.share_cap:
        low, high = 0.0, numbers.max()
        for _ in range(200):
            limit = (low + high) / 2
            cut = np.minimum(numbers, limit)
            low, high = (low, limit) if cut.max() / cut.sum() > federation.share_cap else (limit, high)
        numbers = np.minimum(numbers, low)
    return numbers / numbers.sum()


def aggregated(robust, values, p, starts):
    """Of one set of same-shaped arrays by name per client, by the recipe's aggregator."""
    names = list(values[0])
    flat = np.stack([np.concatenate([one[n].ravel() for n in names]) for one in values])
    start = np.concatenate([np.broadcast_to(starts.get(n, 0.0), values[0][n].shape).ravel() for n in names])
    n, kind = len(flat), robust.aggregator
    if kind == "mean":
        result = p @ flat
    elif kind == "norm-clip":
        changes = flat - start
        lengths = np.linalg.norm(changes, axis=1)
        result = start + p @ (changes * np.minimum(1.0, robust.max_norm / lengths)[:, None])
    elif kind == "median":
        result = np.median(flat, 0)
    elif kind == "trimmed-mean":
        cut = math.floor(robust.trim * n + 1e-9)
        result = np.sort(flat, 0)[cut : n - cut].mean(0)
    else:
        distances = ((flat[:, None] - flat[None]) ** 2).sum(-1)
        scores = [np.sort(np.delete(row, i))[: n - robust.f - 2].sum() for i, row in enumerate(distances)]
        result = flat[np.argsort(scores, kind="stable")[: robust.keep or 1]].mean(0)
    ends = np.cumsum([values[0][n].size for n in names])
    return {
        n: part.reshape(values[0][n].shape)
        for n, part in zip(names, np.split(result, ends[:-1]), strict=True)
    }


def padded(array, name, rank, fill=0.0):
    axis = AXES[split(name)[1]].index("r")
    shape = [rank if i == axis else size for i, size in enumerate(array.shape)]
    whole = np.full(shape, fill)
    whole[tuple(slice(size) for size in array.shape)] = array
    return whole


def expected(config, updates, before):
    """The aggregate densely; for PRODUCTS, ΔW of each layer under its name."""
    federation, rule = config.federation, config.federation.rule
    p = shares(federation, updates)
    sent = [{n: t.double().numpy() for n, t in one.tensors.items()} for one in updates.values()]
    start = {n: t.double().numpy() for n, t in before.items()}
    largest = max(federation.ranks or [4])
    heads = [{n: t for n, t in one.items() if n == HEAD} for one in sent]
    if rule in (*PRODUCTS, "zero-padding"):
        result = {} if not heads[0] else {HEAD: sum(w * one[HEAD] for w, one in zip(p, heads, strict=True))}
        for layer in LAYERS:
            A, B = (f"{layer.name}.lora_{letter}.weight" for letter in "AB")
            if rule == "zero-padding":
                for name in (A, B):
                    total = sum(w * padded(one[name], name, largest) for w, one in zip(p, sent, strict=True))
                    if federation.padding == "by-rank":
                        having = sum(
                            w * padded(np.ones_like(one[name]), name, largest)
                            for w, one in zip(p, sent, strict=True)
                        )
                        seen = having > 0
                        # Of independently drawn A there is nothing to keep in the first round.
                        kept = start.get(name, np.full(total.shape, np.nan))
                        total = np.where(
                            seen, total / np.where(seen, having, 1.0), padded(kept, name, largest, np.nan)
                        )
                    result[name] = total
                continue
            if rule == "raflora":
                W = by_rank(p, [one.scaling for one in updates.values()], sent, (B, A), start)
                result[layer.name] = best_of_rank(W, largest)
                continue
            W = sum(
                w * one.scaling * (mine[B] @ mine[A])
                for w, one, mine in zip(p, updates.values(), sent, strict=True)
            )
            result[layer.name] = best_of_rank(W, largest) if rule == "flexlora" else W
        return result
    if rule == HET:
        products = [
            {
                f"{layer.name}.factoredlora_base.weight": one.get(
                    f"{layer.name}.factoredlora_product.weight",
                    None
                    if f"{layer.name}.factoredlora_B2.weight" not in one
                    else one[f"{layer.name}.factoredlora_B2.weight"] @ one[f"{layer.name}.factoredlora_B1.weight"],
                )
                for layer in LAYERS
            }
            for one in sent
        ]  # fmt: skip
        values = [{**product, **head} for product, head in zip(products, heads, strict=True)]
        result = aggregated(federation.robust, values, p, {HEAD: start.get(HEAD, 0.0)})
        return {n: t if n == HEAD else t + start.get(n, 0.0) for n, t in result.items()}
    if rule == "fedalt":
        sent = [{n.replace(".lora_", ".rest_"): t for n, t in one.items()} for one in sent]
    return aggregated(federation.robust, sent, p, start)


def by_rank(p, scalings, sent, names, start):
    """Of raflora: each rank over the clients that have it, and what nobody has as it was."""
    B, A = names
    largest = max(one[A].shape[0] for one in sent)
    W = 0.0
    for j in range(largest):
        those = [i for i, one in enumerate(sent) if one[A].shape[0] > j]
        W = W + sum(
            p[i] / p[those].sum() * scalings[i] * np.outer(sent[i][B][:, j], sent[i][A][j]) for i in those
        )
    if np.any(start.get(B, 0.0)):
        W = W + start[B][:, largest:] @ start[A][largest:]
    return W


def with_momentum(federation, wanted, before, velocity):
    """The shared state that the server makes of an aggregate, and its v, in place."""
    beta, eta = federation.server_momentum, federation.server_learning_rate
    result = {}
    for name, mean in wanted.items():
        if name not in before:
            result[name] = mean
            continue
        start = before[name].double().numpy()
        velocity[name] = beta * velocity.get(name, 0.0) + (start - mean)
        result[name] = start - eta * velocity[name]
    return result


def assert_right(config, shared, updates, before, velocity):
    wanted = expected(config, updates, before)
    if config.federation.server_momentum or config.federation.server_learning_rate != 1.0:
        wanted = with_momentum(config.federation, wanted, before, velocity)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    stacked = config.federation.rule in PRODUCTS
    for name, value in wanted.items():
        if stacked and name != HEAD:
            B, A = (shared[f"{name}.lora_{letter}.weight"].double().numpy() for letter in "BA")
            np.testing.assert_allclose(B @ A, value, **tolerance)
        else:
            got = shared[name].double().numpy()
            known = np.isfinite(value)
            if (
                got.shape != value.shape
            ):  # ranks that nobody has taken part with yet, and nobody has in common
                got = padded(got, name, value.shape[AXES[split(name)[1]].index("r")])
            np.testing.assert_allclose(got[known], value[known], **tolerance)


def works(rule, options):
    """Two rounds with the right values; False where the recipe is refused, with reasons."""
    try:
        config = recipe(rule, **options)
    except ValidationError as error:
        reasons = [one["msg"] for one in error.errors()]
        assert reasons
        assert all(len(reason) > 20 for reason in reasons)
        return False
    federation = Round(config)
    server, velocity = federation.server, {}
    for number in (1, 2):
        before = dict(server.state().shared or server._start)
        why_not, updates = federation.run(number)
        if server.needed() > len(server.sample(number)):
            raise AssertionError(f"no round of this recipe could ever count: {why_not}")
        assert why_not == "", (rule, options)
        assert federation.left_out == {}
        if rule == "local":
            assert server.state().shared == {}
            continue
        assert_right(config, server.state().shared, updates, before, velocity)
        assert list(server.changes) == sorted(updates)
        for name, share in zip(updates, shares(config.federation, updates), strict=True):
            one = server.changes[name]
            assert one["norm"] > 0
            assert -1.0 <= one["cosine"] <= 1.0
            if config.federation.robust.aggregator in ("mean", "norm-clip"):
                assert one["weight"] == pytest.approx(share, rel=1e-6)
            else:
                assert one["weight"] is None
    return True


REFUSED = {
    "local": {"wire", "upload_dtype", "robust", "r_intermediate", "weights", "padding", "share_cap", "change_cap",
              "share_head", "state", "proximal_mu", "server_momentum", "server_learning_rate"},
    "fedit": {"wire", "ranks", "r_intermediate", "padding", "state", "scalings"},
    "ffa-lora": {"client_init", "wire", "ranks", "r_intermediate", "padding", "state", "scalings"},
    "fedsa-lora": {"wire", "ranks", "r_intermediate", "padding", "scalings"},
    "fed-alora": {"wire", "ranks", "r_intermediate", "padding", "scalings"},
    "rolora": {"client_init", "wire", "ranks", "r_intermediate", "padding", "state", "optimizer_state", "scalings"},
    "zero-padding": {"wire", "robust", "r_intermediate", "state", "scalings"},
    "flora": {"wire", "robust", "r_intermediate", "padding", "state", "optimizer_state", "proximal_mu",
              "server_momentum", "server_learning_rate"},
    "flexlora": {"wire", "robust", "r_intermediate", "padding", "state", "server_momentum", "server_learning_rate"},
    "raflora": {"wire", "robust", "r_intermediate", "padding", "state", "server_momentum", "server_learning_rate"},
    HET: {"padding", "scalings", "proximal_mu"},
    "fedalt": {"wire", "robust", "ranks", "r_intermediate", "padding", "scalings", "proximal_mu", "server_momentum",
               "server_learning_rate"},
}  # fmt: skip


def test_no_option_is_forgotten():
    assert set(FederationSection.model_fields) == (set(OPTIONS) - {"scalings"}) | ELSEWHERE


@pytest.mark.parametrize("option", [None, *OPTIONS])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_each_option_alone(rule, option):
    for value in OPTIONS.get(option, [None]):
        assert works(rule, {option: value} if option else {}) == (option not in REFUSED[rule]), value


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_options_together(rule):
    """Random sets of the options that the rule allows, clients of other ranks more often than not."""
    draw = random.Random(RULE_NAMES.index(rule))
    allowed = [option for option in OPTIONS if option not in REFUSED[rule]]
    worked = 0
    for _ in range(25):
        chosen = draw.sample(allowed, draw.randint(2, min(7, len(allowed))))
        if "ranks" in allowed and draw.random() < 0.5:
            chosen.append("ranks")
        worked += works(rule, {option: draw.choice(OPTIONS[option]) for option in chosen})
    assert worked > 4

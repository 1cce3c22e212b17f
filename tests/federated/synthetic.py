"""Random clients, and the rules written as METHOD says, one matrix at a time in float64 numpy."""

from dataclasses import dataclass, field

import numpy as np
import torch

from braidlora.federated import ClientUpdate

HET = "fed-alora-het"
# The rules that average factors of equal rank, one row each: the factors that travel, in round 1.
EQUAL = {"fedit": "AB", "ffa-lora": "B", "fedsa-lora": "A", "fed-alora": "B", "rolora": "B", "fedalt": "AB"}
ANY = ["zero-padding", "flora", "flexlora", "raflora", HET]
PRODUCTS = ("flora", "flexlora", "raflora")  # which aggregate ΔW
ONE_A = ("ffa-lora", "rolora")  # all clients have the same A in round 1
AGGREGATING = [*EQUAL, *ANY]


@dataclass
class Client:
    """A client's whole adapter, float64, by tensor name."""

    name: str
    rows: int
    rank: int
    scaling: float
    state: dict = field(default_factory=dict)

    def update(self, rule, dtype=None, **settings):
        tensors = rule.outgoing(self.state, settings.get("round") or 1)
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        given = {"rank": self.rank, "scaling": self.scaling, **settings}
        return ClientUpdate(self.name, self.rows, tensors, **given)


def clients(rule, ranks, shapes, *, seed=0, m=5, scaling=2.0, rows=None):
    """One client per rank over layers of the given (d, k): factored adapters for fed-alora-het, pairs for fedalt,
    else plain LoRA."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shared_A = {j: draw(max(ranks), k) for j, (_, k) in enumerate(shapes)}
    made = []
    for i, r in enumerate(ranks):
        count = int(torch.randint(1, 100, (), generator=generator)) if rows is None else rows[i]
        s = scaling if np.isscalar(scaling) else scaling[i]
        client = Client(f"client{i:03d}", count, r, s)
        for j, (d, k) in enumerate(shapes):
            layer = f"base_model.model.layers.{j}.q_proj"
            if rule == HET:
                sizes = {"A": (r, k), "M": (m, r), "B1": (r, m), "B2": (d, r)}
                factors = {f"factoredlora_{name}": draw(*size) for name, size in sizes.items()}
            else:
                A = shared_A[j][:r].clone() if rule in ONE_A else draw(r, k)
                factors = {"lora_A": A, "lora_B": draw(d, r)}
            if rule == "fedalt":
                factors |= {"rest_A": draw(r, k), "rest_B": draw(d, r), "mixer": draw(2, k)}
            client.state.update({f"{layer}.{name}.weight": tensor for name, tensor in factors.items()})
        made.append(client)
    return made


def run(rule, made, shared=None, *, dtype=None, order=None):
    """Round 1 of the rule over the clients."""
    rule.start(shared or {}, 1)
    for client in made if order is None else [made[i] for i in order]:
        rule.add(client.update(rule, dtype))
    return rule.finish()


def weights(made):
    total = sum(client.rows for client in made)
    return [client.rows / total for client in made]


def layers(state):
    return sorted({name.rsplit(".", 2)[0] for name in state})


def get(state, layer, factor):
    return state[f"{layer}.{factor}.weight"].double().numpy()


def expected_shared(name, made, shared=None):
    """The new shared state by the rule's formula; for PRODUCTS the dense ΔW of each layer."""
    p = weights(made)
    result = {}
    for layer in layers(made[0].state):

        def each(factor, layer=layer):
            return [get(client.state, layer, factor) for client in made]

        if name == "raflora":
            result[layer] = by_rank(made, each("lora_B"), each("lora_A"))
            continue
        if name in PRODUCTS:
            pairs = zip(p, made, each("lora_B"), each("lora_A"), strict=True)
            result[layer] = sum(pi * client.scaling * (B @ A) for pi, client, B, A in pairs)
            continue
        if name == HET:
            base = 0.0 if shared is None else get(shared, layer, "factoredlora_base")
            pairs = zip(p, each("factoredlora_B2"), each("factoredlora_B1"), strict=True)
            result[f"{layer}.factoredlora_base.weight"] = base + sum(pi * (B2 @ B1) for pi, B2, B1 in pairs)
            continue
        largest = max(client.rank for client in made)
        for letter in EQUAL.get(name, "AB"):
            total = 0.0
            for pi, matrix in zip(p, each(f"lora_{letter}"), strict=True):
                padded = np.zeros((largest, matrix.shape[1]) if letter == "A" else (matrix.shape[0], largest))
                padded[: matrix.shape[0], : matrix.shape[1]] = matrix
                total = total + pi * padded
            result[f"{layer}.{'rest' if name == 'fedalt' else 'lora'}_{letter}.weight"] = total
    return result


def by_rank(made, Bs, As):
    """Σ_j Σ_{rᵢ > j} (nᵢ / N_j) sᵢ Bᵢ[:, j] Aᵢ[j] over rank indices j, N_j of the clients that have it."""
    total = 0.0
    for j in range(max(client.rank for client in made)):
        those = [i for i, client in enumerate(made) if client.rank > j]
        N = sum(made[i].rows for i in those)
        total = total + sum(
            made[i].rows / N * made[i].scaling * np.outer(Bs[i][:, j], As[i][j]) for i in those
        )
    return total


def own_update(name, client, layer):
    """ΔW of a client before the round, by its own factors."""
    if name == HET:
        A, M, B1, B2 = (get(client.state, layer, f"factoredlora_{f}") for f in ("A", "M", "B1", "B2"))
        return client.scaling * B2 @ B1 @ M @ A
    return client.scaling * get(client.state, layer, "lora_B") @ get(client.state, layer, "lora_A")


def effective(rule, shared, client, layer):
    """ΔW of a client once it has put the payload into its adapter and restarted what restarts."""
    payload = rule.received(rule.payload_for(shared, client.rank, client.scaling), client.rank)
    if rule.spec.carried:  # next to the client's own adapter, which starts at zero
        return get(payload, layer, "carried_B") @ get(payload, layer, "carried_A")
    if rule.spec.adapter == "pair":  # as a client that did not take part receives it
        return client.scaling * get(payload, layer, "rest_B") @ get(payload, layer, "rest_A")
    state = {**rule.restart(client.state, torch.Generator().manual_seed(5)), **payload}
    if rule.spec.name == HET:
        A, M, B1, B2, base = (get(state, layer, f"factoredlora_{f}") for f in ("A", "M", "B1", "B2", "base"))
        return client.scaling * (base + B2 @ B1) @ M @ A
    return client.scaling * get(state, layer, "lora_B") @ get(state, layer, "lora_A")


def best_of_rank(W, rank):
    """The nearest matrix of a rank (Eckart and Young)."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def take(guard, update):
    """As a server does: what the guard passes counts."""
    guard.check(update)
    guard.accepted.add(update.client)

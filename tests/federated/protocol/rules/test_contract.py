"""The public names as an outside caller uses them: real PEFT adapters in, real PEFT adapters out."""

import dataclasses
import inspect
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from synthetic import ONE_A, best_of_rank
from torch import Tensor, nn

from braidlora import FactoredLoraConfig
from braidlora.federated import RULE_NAMES, ClientUpdate, get_rule

MODULES = ("q_proj", "v_proj")
ROWS = {"anna": 30, "bert": 10}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = nn.Linear(12, 10), nn.Linear(12, 8)


def adapted(rank, *, seed, factored=False, alpha=None):
    """A model whose adapter holds random values."""
    settings = {"r": rank, "lora_alpha": alpha or 2 * rank, "target_modules": list(MODULES)}
    config = FactoredLoraConfig(r_intermediate=5, **settings) if factored else LoraConfig(**settings)
    model = get_peft_model(Attention(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "factoredlora_base" not in name:
                parameter.normal_(generator=generator)
    return model


def updates_of(model):
    """ΔW by module, as PEFT computes it."""
    return {
        name: getattr(model.base_model.model, name).get_delta_weight("default").detach() for name in MODULES
    }


def test_client_update():
    assert [(f.name, f.default) for f in dataclasses.fields(ClientUpdate)] == [
        ("client", dataclasses.MISSING), ("num_examples", dataclasses.MISSING), ("tensors", dataclasses.MISSING),
        ("rank", 0), ("scaling", 1.0), ("round", 0), ("steps", 0),
    ]  # fmt: skip
    update = ClientUpdate("a", 3, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.num_examples = 10**9
    assert isinstance(update.tensors, Mapping)


def test_calls():
    rule = get_rule("fed-alora")
    start = inspect.signature(rule.start).parameters
    assert [(name, parameter.default) for name, parameter in start.items()] == [
        ("shared", inspect.Parameter.empty),
        ("round", 0),
    ]
    assert next(iter(inspect.signature(rule.add).parameters)) == "update"
    assert list(inspect.signature(rule.finish).parameters) == []
    assert list(inspect.signature(rule.payload_for).parameters)[:2] == ["shared", "rank"]


@pytest.mark.parametrize("started", ["from nothing", "from the adapter as it starts"])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_round_between_real_adapters(name, started):
    """Two clients train, the server aggregates, and PEFT loads what each is sent; ΔW is what METHOD's table says."""
    factored = name == "fed-alora-het"
    any_rank = get_rule(name).spec.ranks == "any"
    ranks = {"anna": 3, "bert": 2 if any_rank else 3}
    models = {
        client: adapted(ranks[client], seed=seed, factored=factored) for seed, client in enumerate(ranks)
    }
    if name in ONE_A:
        for module in MODULES:
            A, B = (getattr(models[client].base_model.model, module).lora_A["default"] for client in ranks)
            B.load_state_dict(A.state_dict())
    states = {  # copies: PEFT hands out the parameters themselves
        client: {key: t.clone() for key, t in get_peft_model_state_dict(model).items()}
        for client, model in models.items()
    }
    before = {client: updates_of(model) for client, model in models.items()}

    rule, shared = get_rule(name), {}
    if started != "from nothing":
        start = adapted(3, seed=9, factored=factored)
        shared = {
            key: torch.zeros_like(t) if "B" in key or "base" in key else t
            for key, t in get_peft_model_state_dict(start).items()
        }
    rule.start(shared, 1)
    for client in ("bert", "anna"):  # not sorted: the bytes may differ then, the values do not
        sent = {key: t for key, t in states[client].items() if key.split(".")[-2] in rule.spec.at(1).uploads}
        rule.add(ClientUpdate(client, ROWS[client], sent, rank=ranks[client], scaling=2.0))
    result = rule.finish()
    assert all(isinstance(key, str) and isinstance(value, Tensor) for key, value in result.items())

    for client, rank in ranks.items():
        if name == "flora":
            _assert_stack(rule.payload_for(result, rank), before)
            continue
        payload = rule.received(rule.payload_for(result, rank, round=1), rank)
        if rule.spec.adapter == "pair":  # the others' mean is a LoRA next to the client's own
            payload = {key.replace(".rest_", ".lora_"): t for key, t in payload.items()}
        known = get_peft_model_state_dict(models[client])
        assert {key: t.shape for key, t in payload.items()} == {key: known[key].shape for key in payload}
        set_peft_model_state_dict(models[client], {**rule.restart(known), **payload})
        after = updates_of(models[client])
        for module in MODULES:
            wanted = _wanted(name, client, module, states, before)
            torch.testing.assert_close(after[module], wanted, atol=2e-5, rtol=1e-5)


def _mean(values):
    """By rows: 30 and 10."""
    return 0.75 * values["anna"] + 0.25 * values["bert"]


def _wanted(name, client, module, states, before):
    def each(factor):
        return {one: states[one][f"base_model.model.{module}.{factor}.weight"] for one in states}

    if name == "local":
        return before[client][module]
    if name == "fed-alora-het":
        taught = _mean({one: each("factoredlora_B2")[one] @ each("factoredlora_B1")[one] for one in states})
        return 2.0 * taught @ each("factoredlora_M")[client] @ each("factoredlora_A")[client]
    A, B = each("lora_A"), each("lora_B")
    if name in ("ffa-lora", "fed-alora", "rolora"):
        return 2.0 * _mean(B) @ A[client]
    if name == "fedsa-lora":
        return 2.0 * B[client] @ _mean(A)
    if name in ("fedit", "fedalt"):
        return 2.0 * _mean(B) @ _mean(A)
    rank = A[client].shape[0]
    if name == "flexlora":
        W = _mean({one: before[one][module] for one in before})
        return torch.from_numpy(best_of_rank(W.double().numpy(), rank)).float()
    if name == "raflora":  # the third rank is anna's alone
        W = (
            _mean({one: 2.0 * B[one][:, :2] @ A[one][:2] for one in A})
            + 2.0 * B["anna"][:, 2:] @ A["anna"][2:]
        )
        return torch.from_numpy(best_of_rank(W.double().numpy(), rank)).float()
    padded_A = _mean({one: torch.cat([a, a.new_zeros(3 - len(a), 12)]) for one, a in A.items()})
    padded_B = _mean({one: torch.cat([b, b.new_zeros(len(b), 3 - b.shape[1])], 1) for one, b in B.items()})
    return 2.0 * padded_B[:, :rank] @ padded_A[:rank]


def _assert_stack(payload, before):
    """The stack is a LoRA of rank 3 + 2 with scaling 1, which PEFT loads."""
    model = adapted(5, seed=7, alpha=5)
    set_peft_model_state_dict(model, payload)
    for module, update in updates_of(model).items():
        wanted = _mean({one: before[one][module] for one in before})
        torch.testing.assert_close(update, wanted, atol=2e-5, rtol=1e-5)

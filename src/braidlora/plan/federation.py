"""The plan of a federated recipe: the traffic of every rule, and what a client needs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch

from braidlora.config import ClientSection, FederatedConfig
from braidlora.federated import AdaptedLayer, Rule, get_rule
from braidlora.federated.protocol.communication import Traffic, parameters, serialized_bytes, traffic
from braidlora.federated.protocol.factors import AXES, factor_shapes, split
from braidlora.federated.protocol.recipe import make_rule
from braidlora.federated.protocol.rules import RuleSpec, rule_specs
from braidlora.federated.protocol.seeds import sampled
from braidlora.federated.site import pair
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.host import client_config
from braidlora.models.attach import wrap
from braidlora.plan.adapter import file_bytes, memory_of
from braidlora.plan.base import base_of
from braidlora.plan.layers import layers_of
from braidlora.plan.memory import Memory
from braidlora.plan.privacy import plan_privacy

Shapes = dict[str, tuple[int, ...]]


def plan_federation(config: FederatedConfig) -> dict[str, Any]:
    """Traffic by every rule that the clients' ranks allow, each client's adapter, and the memory of its training.

    Returns:
        `{"plan": "federate", "base", "rule", "rounds", "clients", "asked_per_round", "privacy", "adapters", "rules",
        "memory"}`; `rules` has an entry per rule and wire form: the traffic of each rank and its mean over the clients
        (in a round with all clients if ranks differ), and that of all rounds, for the clients that the seed samples.
        Nothing is sent down in the first round, because all clients start from the recipe's seed.

    Raises:
        ConfigError: the base has no configuration, or the adapter does not fit it.
        DataError: the clients depend on the data, and these cannot be read.
    """
    base = base_of(config)
    clients = _clients(config)
    ranks = [client.rank or config.adapter.r for client in clients]
    model = _attached(base.network, config, max(ranks))
    layers, head = layers_of(model), _head(model)
    sample_size = config.sampled_per_round(len(clients))
    rule = make_rule(config)
    memory = _memory(model, base, config, rule.spec)
    if rule.spec.carried:
        carried = _carried_parameters(layers, ranks, sample_size, config.federation.rounds)
        note = f"the adapter includes the stack that clients hold under {rule.spec.name} after the last round"
        memory = dataclasses.replace(
            memory, adapter=memory.adapter + 4 * carried, notes=(*memory.notes, note)
        )
    return {
        "plan": "federate",
        "base": base.to_json(config),
        "rule": rule.spec.name,
        "wire": config.federation.wire if rule.spec.wires else None,
        "rounds": config.federation.rounds,
        "clients": len(clients),
        "asked_per_round": sample_size,
        "privacy": plan_privacy(config, len(clients)),
        "layers": len(layers),
        "adapters": _adapters(config, rule, layers, head, ranks),
        "rules": rule_traffic(
            config,
            layers,
            head if config.federation.share_head else {},
            {client.name: rank for client, rank in zip(clients, ranks, strict=True)},
        ),
        "memory": memory.to_json(),
    }


def rule_traffic(
    config: FederatedConfig, layers: Sequence[AdaptedLayer], head: Shapes, clients: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Every rule's traffic with these clients; if ranks differ, rules that need equal ranks have a reason instead.

    Args:
        head: shapes of other tensors that are sent up and down.
        clients: rank by name.
    """
    ranks = list(clients.values())
    federation, sample_size = config.federation, config.sampled_per_round(len(ranks))
    entries = []
    for spec in rule_specs():
        also = head if spec.shares else {}
        for wire in spec.wires or (None,):
            settings = {} if wire is None else {"wire": wire}
            rule = get_rule(spec.name, r_intermediate=federation.r_intermediate, **settings)
            entry: dict[str, Any] = {"rule": spec.name, "wire": wire}
            if spec.ranks == "equal" and len(set(ranks)) > 1:
                entries.append({**entry, "reason": "needs one rank for all clients"})
                continue
            sent = traffic(
                rule,
                layers,
                # With equal ranks, any sample of the clients makes the same round.
                ranks[:sample_size] if len(set(ranks)) == 1 else ranks,
                dtype=getattr(torch, federation.upload_dtype),
                down_dtype=torch.float32,
                also=also,
            )
            entries.append(
                {**entry, **_summary(sent), "all_rounds": _all_rounds(rule, config, layers, also, clients)}
            )
    return entries


def _all_rounds(
    rule: Rule,
    config: FederatedConfig,
    layers: Sequence[AdaptedLayer],
    also: Shapes,
    clients: Mapping[str, int],
) -> dict[str, int]:
    """Bytes of all clients in all rounds, for the clients that the recipe's seed samples in each."""
    federation, sample_size = config.federation, config.sampled_per_round(len(clients))
    dtype = getattr(torch, federation.upload_dtype)
    turns = len(rule.spec.turns) or 1
    known: dict[tuple[int, ...], int] = {}

    def up(rank: int, round: int) -> int:
        key = (rank, round % turns)
        if key not in known:
            known[key] = serialized_bytes(rule.upload_shapes(layers, rank, round) | also, dtype)
        return known[key]

    def down(rank: int, ranks: Sequence[int], round: int) -> int:
        key = (rank, sum(ranks), max(ranks), round and 1 + round % turns)  # all that shapes depend on
        if key not in known:
            shapes = rule.download_shapes(layers, rank, ranks, round) | also
            known[key] = serialized_bytes(shapes, torch.float32)
        return known[key]

    total = {"up_bytes": 0, "down_bytes": 0}
    all_ranks = list(clients.values())
    last: dict[str, int] = {}  # ranks of the clients that took part in the last round
    ever: list[int] = []  # and in all rounds, once for every round
    for round in range(1, federation.rounds + 1):
        now = {name: clients[name] for name in sampled(clients, sample_size, config.seed, round)}
        for name, rank in now.items():
            total["up_bytes"] += up(rank, round)
            if last:
                # A client that missed the last round is sent the result of all rounds. A stack that clients carry is
                # made by the participants; other shared states have the ranks of all clients from the start.
                participants = list(last.values()) if name in last else ever
                ranks = participants if rule.spec.carried else all_ranks
                total["down_bytes"] += down(rank, ranks, round - 1 if name in last else 0)
        last, ever = now, [*ever, *now.values()]
    return total


def _summary(sent: Sequence[Traffic]) -> dict[str, Any]:
    by_rank = {one.rank: dataclasses.asdict(one) for one in sent}
    keys = ("up_parameters", "down_parameters", "up_bytes", "down_bytes")
    mean = {key: math.fsum(getattr(one, key) for one in sent) / len(sent) for key in keys}
    return {"by_rank": [by_rank[rank] for rank in sorted(by_rank)], "mean": mean}


def _clients(config: FederatedConfig) -> list[ClientSection]:
    known = config.clients()
    if known is not None:
        return known
    loaded = load_clients(config).by_name.values()
    return [ClientSection(name=one.name, tasks=[config.divided_task()], rank=one.rank) for one in loaded]


def _attached(network: Any, config: FederatedConfig, rank: int) -> Any:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = client_config(config, network)
        adapter.r, adapter.lora_alpha = rank, config.scaling * rank
        return wrap(network, adapter, seed=0)


def _memory(model: Any, base: Any, config: FederatedConfig, spec: RuleSpec) -> Memory:
    """Of a training step; of a rule that alternates, in the turn that needs most."""
    steps = []
    if spec.adapter == "pair":
        pair.divide(model, "default")
    for turn in spec.turns or (spec.at(0),):
        for name, parameter in model.named_parameters():
            factor = split(pair.tensor_name(name.replace(".default", "")))[1]
            if factor in spec.factors:
                parameter.requires_grad_(factor in turn.trains)
        steps.append(memory_of(model, base, config))
    return max(steps, key=lambda step: step.total or 0)


def _head(model: Any) -> Shapes:
    """Shapes of the parameters that are trained in full, by name."""
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    known = {*AXES, *pair.FACTORS}
    return {name: tuple(tensor.shape) for name, tensor in state.items() if split(name)[1] not in known}


def _adapters(
    config: FederatedConfig,
    rule: Rule,
    layers: Sequence[AdaptedLayer],
    head: Shapes,
    ranks: Sequence[int],
) -> list[dict[str, int]]:
    """Per rank: how many clients have it, what one trains, and the size of its adapter's file."""
    m, entries = config.federation.r_intermediate, []
    for rank in sorted(set(ranks)):
        trained = parameters(factor_shapes(layers, rule.spec.trains, rank, m)) + parameters(head)
        shapes: Mapping[str, tuple[int, ...]] = factor_shapes(layers, rule.spec.factors, rank, m) | head
        state = pair.joined({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        entries.append(
            {
                "rank": rank,
                "clients": ranks.count(rank),
                "trainable_parameters": trained,
                "file_bytes": file_bytes(state),
            }
        )
    return entries


def _carried_parameters(
    layers: Sequence[AdaptedLayer], ranks: Sequence[int], sample_size: int, rounds: int
) -> int:
    """Size of the stack that a client carries after the last round."""
    stacked = sum(sorted(ranks, reverse=True)[:sample_size]) * rounds
    return sum((d + k) * min(stacked, d, k) for _, d, k in layers)

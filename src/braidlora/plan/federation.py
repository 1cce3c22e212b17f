"""The plan of a federated recipe: what travels by every rule, and what a client needs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from braidlora.config import ClientSection, FederatedConfig
from braidlora.errors import ConfigError
from braidlora.federated import RULE_NAMES, AdaptedLayer, Rule, get_rule
from braidlora.federated.protocol.communication import Traffic, parameters, serialized_bytes, traffic
from braidlora.federated.protocol.factors import AXES, factor_shapes, split
from braidlora.federated.protocol.initial import client_factors
from braidlora.federated.protocol.server import sampled
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.host import client_config
from braidlora.plan.adapter import file_bytes, memory_of
from braidlora.plan.base import base_of

HET = "fed-alora-het"
Shapes = dict[str, tuple[int, ...]]


def plan_federation(config: FederatedConfig) -> dict[str, Any]:
    """Traffic by every rule that the clients' ranks allow, each client's adapter, and the memory of its training.

    Returns:
        `{"plan": "federate", "base", "rule", "rounds", "clients", "asked_per_round", "adapters", "rules", "memory"}`;
        `rules` has an entry per rule and wire form: the traffic of each rank and its mean over the clients, as if all
        took part in a round where ranks differ, and that of all rounds, of the clients that the seed draws. Nothing is
        sent down in the first round, for all start from the recipe's seed.

    Raises:
        ConfigError: the base has no configuration, or the adapter does not fit it.
        DataError: only the data tell who the clients are, and they cannot be read.
    """
    base = base_of(config)
    clients = _clients(config)
    ranks = [client.rank or config.adapter.r for client in clients]
    model = _attached(base.network, config, max(ranks))
    layers, head = _layers(model), _head(model)
    asked = config.asked_per_round(len(clients))
    rule = get_rule(config.federation.rule)
    memory = memory_of(model, base, config)
    carried = _carried_parameters(rule, layers, ranks, asked, config.federation.rounds)
    if carried:
        note = (
            "the stack that flora's clients carry, as it is after the last round, is counted with the adapter"
        )
        memory = dataclasses.replace(
            memory, adapter=memory.adapter + 4 * carried, notes=(*memory.notes, note)
        )
    return {
        "plan": "federate",
        "base": base.to_json(config),
        "rule": rule.name,
        "wire": config.federation.wire if rule.name == HET else None,
        "rounds": config.federation.rounds,
        "clients": len(clients),
        "asked_per_round": asked,
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
    """Every rule's traffic with these clients; rules that need equal ranks have a reason instead where ranks differ.

    Args:
        head: shapes of what else travels both ways.
        clients: rank by name.
    """
    ranks = list(clients.values())
    federation, asked = config.federation, config.asked_per_round(len(ranks))
    entries = []
    for name in RULE_NAMES:
        also = head if name != "local" else {}
        for wire in ("factors", "smallest") if name == HET else (None,):
            rule = get_rule(name) if wire is None else get_rule(name, wire=wire)
            entry: dict[str, Any] = {"rule": name, "wire": wire}
            if rule.ranks == "equal" and len(set(ranks)) > 1:
                entries.append({**entry, "reason": "needs one rank for all clients"})
                continue
            sent = traffic(
                rule,
                layers,
                # Where clients are alike, whoever is asked makes the same round.
                ranks[:asked] if len(set(ranks)) == 1 else ranks,
                r_intermediate=federation.r_intermediate,
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
    """Bytes of all clients in all rounds, of just the clients that the recipe's seed draws for each."""
    federation, asked = config.federation, config.asked_per_round(len(clients))
    m, dtype = federation.r_intermediate, getattr(torch, federation.upload_dtype)
    up = {
        rank: serialized_bytes(rule.upload_shapes(layers, rank, m) | also, dtype)
        for rank in set(clients.values())
    }
    known: dict[tuple[int, int, int], int] = {}

    def down(rank: int, ranks: Sequence[int]) -> int:
        key = (rank, sum(ranks), max(ranks))  # all that shapes depend on
        if key not in known:
            shapes = rule.download_shapes(layers, rank, ranks, m) | also
            known[key] = serialized_bytes(shapes, torch.float32)
        return known[key]

    total = {"up_bytes": 0, "down_bytes": 0}
    everybody = list(clients.values())
    last: dict[str, int] = {}  # ranks of those who took part in the last round
    ever: list[int] = []  # and in all rounds, once for every round
    for round in range(1, federation.rounds + 1):
        now = {name: clients[name] for name in sampled(clients, asked, config.seed, round)}
        for name, rank in now.items():
            total["up_bytes"] += up[rank]
            if last:
                # flora sends the last round's stack to those who had a part in it, and all rounds' to the others;
                # zero-padding's shared state has the largest rank of all clients from the start.
                stack = list(last.values()) if name in last else ever
                total["down_bytes"] += down(rank, stack if rule.name == "flora" else everybody)
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
    import peft

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = client_config(config, network)
        adapter.r, adapter.lora_alpha = rank, config.scaling * rank
        try:
            model = peft.get_peft_model(network, adapter)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"adapter: PEFT cannot adapt this base so: {error}") from error
    rule = get_rule(config.federation.rule)
    for name, parameter in model.named_parameters():
        factor = split(name.replace(".default", ""))[1]
        if factor in AXES and factor not in rule.trains:
            parameter.requires_grad_(False)
    return model


def _layers(model: Any) -> list[AdaptedLayer]:
    from braidlora.adapters._peft_compat import BaseTunerLayer

    return [
        AdaptedLayer(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _head(model: Any) -> Shapes:
    """Shapes of what is trained in full, by name."""
    import peft

    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if split(name)[1] not in AXES}


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
        trained = parameters(factor_shapes(layers, rule.trains, rank, m)) + parameters(head)
        whole: Mapping[str, tuple[int, ...]] = factor_shapes(layers, client_factors(rule), rank, m) | head
        state = {name: torch.empty(shape, device="meta") for name, shape in whole.items()}
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
    rule: Rule, layers: Sequence[AdaptedLayer], ranks: Sequence[int], asked: int, rounds: int
) -> int:
    """Size of the stack that a client of flora carries after the last round; 0 under other rules."""
    if rule.name != "flora":
        return 0
    stacked = sum(sorted(ranks, reverse=True)[:asked]) * rounds
    return sum((d + k) * min(stacked, d, k) for _, d, k in layers)

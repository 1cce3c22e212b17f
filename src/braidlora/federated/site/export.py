"""A client's model as an adapter folder in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from braidlora.federated.protocol.factors import CARRIED, join, layers_of, split
from braidlora.federated.site.clients import Client
from braidlora.federated.site.host import Host
from braidlora.federated.site.pair import joined
from braidlora.models.adapter_writer import write_adapter
from braidlora.runs import commit_directory
from braidlora.tasks import adapter_card


def save_client_adapter(host: Host, client: Client, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a client's model: a LoRA that plain PEFT loads; or a FACTOREDLORA (fed-alora-het) or BRAIDLORA (fedalt).

    Under flora that is the stack as a LoRA of the stack's rank with scaling 1, plus the client's own adapter unless it
    has just restarted at zero.
    """
    config = host.peft_config(client.rank, client.scaling)
    own = {name: tensor for name, tensor in tensors.items() if split(name)[1] not in host.rule.spec.carried}
    if carrying := layers_of(tensors, CARRIED):
        ranks = {}
        for layer in carrying:
            A, B = _with_own(tensors, layer, client.scaling)
            own[join(layer, "lora_A")], own[join(layer, "lora_B")] = A, B
            ranks[layer.removeprefix("base_model.model.")] = len(A)
        config.r = max(ranks.values())
        config.lora_alpha = config.r
        config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
    if host.rule.spec.adapter == "pair":
        own = joined(own)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with commit_directory(folder) as staging:
        card = adapter_card(client.own_tasks(), host.label_space, host.base, host.config, host.tokenizer)
        write_adapter(staging, own, config, card)


def _with_own(tensors: Mapping[str, Tensor], layer: str, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of the stack that a client carries, with the client's own adapter appended if it is not zero."""
    A, B = tensors[join(layer, "carried_A")], tensors[join(layer, "carried_B")]
    own_A, own_B = tensors[join(layer, "lora_A")], tensors[join(layer, "lora_B")]
    if not own_B.any():
        return A, B
    return torch.cat([A, own_A], 0), torch.cat([B, own_B * scaling], 1)

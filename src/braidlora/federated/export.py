"""A client's model as an adapter folder in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from braidlora.federated.clients import Client
from braidlora.federated.factors import join, split
from braidlora.federated.host import CARRIED, Host
from braidlora.runs import commit_directory
from braidlora.training.adapter_files import write_adapter


def save_client_adapter(host: Host, client: Client, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the model that a client has received: a LoRA that plain PEFT loads, or a FACTOREDLORA.

    Under flora that is the stack, a LoRA of the stack's rank with scaling 1: the client's own adapter has just
    restarted, and adds nothing.
    """
    config = host.peft_config(client.rank, client.scaling)
    own = {name: tensor for name, tensor in tensors.items() if split(name)[1] not in CARRIED}
    stacks = {layer: tensors[join(layer, "carried_A")] for layer in _carrying(tensors)}
    if stacks:
        ranks = {layer.removeprefix("base_model.model."): len(A) for layer, A in stacks.items()}
        config.r = max(ranks.values())
        config.lora_alpha = config.r
        config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        for layer in stacks:
            own[join(layer, "lora_A")] = tensors[join(layer, "carried_A")]
            own[join(layer, "lora_B")] = tensors[join(layer, "carried_B")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with commit_directory(folder) as staging:
        write_adapter(staging, own, config)


def _carrying(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(layer for layer, factor in map(split, tensors) if factor == "carried_A")

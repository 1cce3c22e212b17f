"""One rank of `test_two_processes_train_like_one`: METHOD HOW BASE_FOLDER OUT."""

import os
import re
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from braidlora import FactoredLoraConfig, FactoredLoraLayer, MultiLoraConfig, MultiLoraLayer

STEPS, RATE = 3, 0.3
PREFIX = re.compile("(braid|factored)lora_")


def adapted(base_folder, method):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    config = {"alora": MultiLoraConfig, "factored": FactoredLoraConfig}[method](
        r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    return get_peft_model(model, config)


def shard(model, how):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model),
            use_orig_params=how == "fsdp1-orig-params",
            device_id=torch.device("cpu"),
        )
    if how == "fsdp2-leaves":  # every adapter linear is a unit of its own
        kinds = (MultiLoraLayer, FactoredLoraLayer)
        for layer in [module for module in model.modules() if isinstance(module, kinds)]:
            for factor in layer.adapter_layer_names:
                if "default" in getattr(layer, factor):  # a scheme without a router or task matrices has none
                    fully_shard(getattr(layer, factor)["default"])
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def adapter_weights(model, how):
    if how.startswith("fsdp1"):
        whole = FullStateDictConfig(rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, whole):
            state = model.state_dict()
    else:
        state = model.state_dict()
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    return {k.removeprefix("module."): v.detach().clone() for k, v in state.items() if PREFIX.search(k)}


def main(method, how, base_folder, out):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    model = adapted(base_folder, method)
    if how != "single":
        dist.init_process_group("gloo", rank=rank, world_size=world)
        if how.startswith("fsdp1"):
            # FSDP1 wants all parameters of a unit to be frozen, or none, unless it keeps the original ones.
            assert fsdp_auto_wrap_policy(model) is not None
        model = shard(model, how)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        ids = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(step))
        rows = ids[rank * 4 // world : (rank + 1) * 4 // world]
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    weights = adapter_weights(model, how)
    if rank == 0:
        torch.save(weights, out)
    if how != "single":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

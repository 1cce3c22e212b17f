"""Random adapters of a tiny network, saved by PEFT."""

import peft
import torch
from torch import nn


class Tiny(nn.Module):
    """Two layers with two linear modules each, of different widths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 10, bias=False), "v": nn.Linear(12, 6, bias=False)})
            for _ in range(2)
        )


def save(config, folder, seed=0):
    torch.manual_seed(seed)
    model = peft.get_peft_model(Tiny(), config)
    model.save_pretrained(folder)
    return model


def random_init(config_class, **settings):
    """All matrices random, B included."""
    off = {"init_lora_weights": False} if config_class is peft.LoraConfig else {"init_weights": False}
    return config_class(target_modules=["q", "v"], r=3, **settings, **off)

"""PEFT's optimizers for LoRA on our adapters: LoRA+ groups them rightly, the others refuse by name."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from tiny import CONFIGS, IDS, adapted, config, llama, trainable

from braidlora.errors import ConfigError

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


@BOTH
@pytest.mark.parametrize("experts", [1, 3])
def test_lorafa_refuses_when_it_is_made_and_leaves_no_trace(tuner, experts):
    model = adapted(tuner, **({"num_experts": experts} if tuner == "multi" else {}))
    model.add_adapter("second", config(tuner))
    before = trainable(model)
    with pytest.raises(ConfigError, match=r"LoRA-FA.* (braidlora_|router).*AdamW.*requires_grad_\(False\)"):
        create_lorafa_optimizer(model, r=4, lora_alpha=16, lr=1e-3)
    assert trainable(model) == before


def test_lorafa_still_serves_lora():
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize(
    "imports",
    [
        "from peft.optimizers import create_lorafa_optimizer\nimport braidlora",
        "import braidlora\nfrom peft.optimizers import create_lorafa_optimizer",
    ],
)
def test_in_every_order_of_imports(imports):
    code = (
        f"{imports}\nimport torch, peft\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = peft.get_peft_model(model, braidlora.MultiLoraConfig(target_modules=['0'], r=2))\n"
        "try:\n    create_lorafa_optimizer(model, r=2, lora_alpha=16, lr=1e-3)\n"
        "except braidlora.errors.ConfigError as error:\n    print('refused', error)\n"
    ).replace("import torch, peft", "import torch, peft, braidlora.errors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refused LoRA-FA's optimizer")


@BOTH
def test_riemannian_preconditioning_refuses(tuner):
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(adapted(tuner), torch.optim.AdamW, lr=1e-3)


@BOTH
def test_loraplus_gives_the_higher_rate_to_b(tuner):
    """The router and all factors that read the input learn at lr; of a factored LoRA both factors of B are B."""
    model = adapted(tuner, modules_to_save=["lm_head"])
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert set(rates) == trainable(model)
    high = {name for name, rate in rates.items() if rate == pytest.approx(1.6e-2)}
    low = {name for name, rate in rates.items() if rate == 1e-3}
    assert high | low == set(rates)
    assert high == {name for name in rates if "lora_B" in name}
    kinds = {name.split(".")[-3] for name in low if "modules_to_save" not in name}
    assert (
        kinds
        == {"multi": {"braidlora_A", "braidlora_router"}, "factored": {"factoredlora_A", "factoredlora_M"}}[
            tuner
        ]
    )
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()

"""`hotswap_adapter`: the weights of another adapter of one shape, in place; or nothing at all."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, adapted, config, llama, logits
from torch import nn
from transformers import LlamaForSequenceClassification

from braidlora import MultiLoraConfig
from braidlora.adapters import for_tasks, hotswap_adapter
from braidlora.errors import CheckpointError, ConfigError

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


def saved(folder, tuner, seed=5, **settings):
    """Another adapter, saved; returns its logits."""
    torch.manual_seed(seed)
    base = settings.pop("base", None) or llama()
    model = get_peft_model(base, config(tuner, **settings)).double().eval()
    model.save_pretrained(folder)
    return logits(model)


@BOTH
@pytest.mark.parametrize("name", ["default", "mine"])
def test_weights_scaling_and_settings_are_those_of_the_other(tuner, name, tmp_path):
    other = {"lora_alpha": 40, "use_rslora": True, "alpha_pattern": {"v_proj": 3.0}, "lora_dropout": 0.5}
    if tuner == "multi":
        other["router_temperature"] = 0.5
    expected = saved(tmp_path, tuner, **other)
    model = adapted(tuner, name=name)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path, name)
    assert torch.equal(logits(model), expected)
    assert all(parameters[n] is p for n, p in model.named_parameters()), "the parameters are the same objects"
    assert {field: getattr(model.peft_config[name], field) for field in other} == other
    model.save_pretrained(tmp_path / "again")
    folder = tmp_path / "again" / ("" if name == "default" else name)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder).double().eval()), expected)


MTL = {"share": "A", "gate": "task", "task_map": True, "task_names": ["a", "b"]}


def by_task(model):
    found = {}
    for name in ("a", "b"):
        with for_tasks(name):
            found[name] = logits(model)
    return found


def test_every_task_keeps_its_weights_if_the_tasks_are_in_another_order(tmp_path):
    torch.manual_seed(5)
    other = get_peft_model(llama(), config("multi", **MTL | {"task_names": ["b", "a"]}))
    for name, parameter in other.named_parameters():
        if "braidlora_map" in name:
            nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    expected = by_task(other.double().eval())
    assert not torch.equal(expected["a"], expected["b"])
    model = adapted("multi", **MTL)
    hotswap_adapter(model, tmp_path / "other")
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again").double().eval()
    for swapped in (model, loaded):
        found = by_task(swapped)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


COMPARED = {
    "share": "A", "num_experts": 2, "gate": "task", "task_map": True, "bias": "all", "trainable_token_indices": [3],
}  # fmt: skip
TAKEN_OVER = {
    "lora_alpha": 40, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True, "lora_dropout": 0.5,
    "dropout_mask": "per_expert", "router_temperature": 0.5, "balance_loss": 0.1, "task_names": ["x", "a"],
    "alignment_loss": 0.2, "alignment": "kl",
}  # fmt: skip
# What is no part of the function, or in the tensors if it differs.
OF_THE_MODEL = {
    "r", "rank_pattern", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "ensure_weight_tying", "init_weights", "fused", "task_type", "peft_type",
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip


def test_no_setting_of_the_other_is_lost(tmp_path):
    fields = {field.name for field in dataclasses.fields(MultiLoraConfig)}
    assert fields == {*COMPARED, *TAKEN_OVER, *OF_THE_MODEL}
    own = {"share": "none", "task_names": ["a", "b"]}
    with for_tasks("a"):
        for name, value in COMPARED.items():
            saved(tmp_path / name, "multi", **own | {name: value})
            refuses(
                adapted("multi", **own), tmp_path / name, ConfigError, f"{name} is .*, and .* in the model"
            )
        saved(tmp_path / "all", "multi", **own | TAKEN_OVER)
    model = adapted("multi", **own)
    hotswap_adapter(model, tmp_path / "all")
    assert {name: getattr(model.peft_config["default"], name) for name in TAKEN_OVER} == TAKEN_OVER


@BOTH
def test_other_adapters_and_heads(tuner, tmp_path):
    def base():
        return llama(LlamaForSequenceClassification, num_labels=3)

    settings = {"modules_to_save": ["score"], "rank_pattern": {"q_proj": 2}}
    torch.manual_seed(9)
    source = get_peft_model(base(), config(tuner, **settings)).double().eval()
    nn.init.normal_(source.base_model.model.score.modules_to_save["default"].weight)
    source.save_pretrained(tmp_path)
    model = adapted(tuner, base(), name="mine", **settings)
    model.add_adapter("other", config(tuner))
    before = {n: p.clone() for n, p in model.named_parameters() if ".mine." not in n}
    hotswap_adapter(model, str(tmp_path), "mine")
    assert torch.equal(logits(model), logits(source))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".mine." not in n)


@pytest.mark.parametrize("tuner", ["multi", pytest.param("factored", marks=pytest.mark.slow)])
def test_a_compiled_model_stays_compiled(tuner, tmp_path):
    expected = saved(tmp_path, tuner)
    model = adapted(tuner)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    hotswap_adapter(compiled, tmp_path)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(logits(compiled), expected)


def drop(tensors):
    tensors.pop(sorted(tensors)[0])


def add(tensors):
    tensors["base_model.model.extra.weight"] = torch.ones(1)


def cut(tensors):
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name][:, :-1].contiguous()


def poison(tensors):
    tensors[sorted(tensors)[-1]][0, 0] = float("inf")


@BOTH
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop, "1 missing"),
        (add, "1 not in this model"),
        (cut, "1 with a different shape"),
        (poison, "1 not finite"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tuner, damage, said, tmp_path):
    saved(tmp_path, tuner, lora_alpha=40)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    refuses(adapted(tuner), tmp_path, CheckpointError, said)


def refuses(model, folder, error, said):
    expected, scaling = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj.scaling.copy()
    before = model.peft_config["default"].to_dict()
    with pytest.raises(error, match=said):
        hotswap_adapter(model, folder)
    assert torch.equal(logits(model), expected)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == scaling
    assert model.peft_config["default"].to_dict() == before


@BOTH
def test_a_file_cut_short_changes_nothing(tuner, tmp_path):
    saved(tmp_path, tuner)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(adapted(tuner), tmp_path, CheckpointError, "cannot be read")
    path.unlink()
    refuses(adapted(tuner), tmp_path, CheckpointError, "cannot be read")


@pytest.mark.parametrize(
    ("tuner", "settings", "error", "said"),
    [
        ("multi", {"share": "none"}, ConfigError, "share is 'none', and 'B' in the model"),
        ("multi", {"num_experts": 6, "r": 2}, ConfigError, "num_experts is 6, and 3 in the model"),
        ("multi", {"r": 2}, CheckpointError, "8 with a different shape"),
        ("multi", {"target_modules": ["q_proj"]}, CheckpointError, "6 missing"),
        ("factored", {"r_intermediate": 8}, ConfigError, "r_intermediate is 8, and 16 in the model"),
        ("factored", {"r": 2}, CheckpointError, "with a different shape"),
    ],
)
def test_another_shape_changes_nothing(tuner, settings, error, said, tmp_path):
    saved(tmp_path, tuner, **settings)
    refuses(adapted(tuner), tmp_path, error, said)


@BOTH
def test_what_else_is_refused(tuner, tmp_path):
    saved(tmp_path, tuner)
    other = {"multi": "factored", "factored": "multi"}[tuner]
    refuses(adapted(other), tmp_path, ConfigError, "cannot replace")
    model = adapted(tuner, **({"num_experts": 1} if tuner == "multi" else {}))
    with pytest.raises(ConfigError, match="no adapter 'mine' on this model; known are default"):
        hotswap_adapter(model, tmp_path, "mine")
    with pytest.raises(ConfigError, match="it must be a PeftModel"):
        hotswap_adapter(llama(), tmp_path)
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"peft\.utils\.hotswap\.hotswap_adapter is for LoRA"):
        hotswap_adapter(lora, tmp_path)
    shutil.rmtree(tmp_path)
    saved(tmp_path, tuner, **({"num_experts": 1} if tuner == "multi" else {}))
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged into the base weights"):
        hotswap_adapter(model, tmp_path)


@BOTH
def test_pefts_own_function_says_that_it_is_for_lora(tuner, tmp_path):
    saved(tmp_path, tuner)
    model = adapted(tuner)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA but (BRAIDLORA|FACTOREDLORA)"):
        pefts_hotswap(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(model), expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4

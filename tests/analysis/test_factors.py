"""Adapters on disk against what PEFT makes of them, and what is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import random_init, save

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.analysis.factors import AdapterFile, LayerName
from braidlora.cli import main
from braidlora.errors import CheckpointError


@pytest.mark.parametrize(
    "config",
    [
        random_init(peft.LoraConfig, lora_alpha=7),
        random_init(
            peft.LoraConfig, use_rslora=True, alpha_pattern={"layers.1.q": 5}, rank_pattern={"layers.0.v": 2}
        ),
        random_init(FactoredLoraConfig, r_intermediate=4, lora_alpha=6),
        random_init(MultiLoraConfig, num_experts=1, share="B", alpha_pattern={"v": 3.0}),
    ],
    ids=["lora", "patterns", "factored", "one expert"],
)
def test_the_update_is_the_one_that_peft_merges(config, tmp_path):
    model = save(config, tmp_path)
    adapter = AdapterFile(tmp_path, "x")
    assert [layer.name for layer in adapter.layers] == [f"layers.{i}.{m}" for i in (0, 1) for m in "qv"]
    for layer in adapter.layers:
        factors = adapter.read(layer.name)
        expected = model.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        ((A, B),) = factors.updates
        assert torch.allclose(factors.scaling * (B @ A).float(), expected, atol=1e-6)
        assert adapter.widths(layer.name) == (A.shape[1], B.shape[0])


@pytest.mark.parametrize(("share", "many_A", "many_B"), [("B", 3, 1), ("A", 1, 3), ("none", 3, 3)])
def test_experts_are_blocks(share, many_A, many_B, tmp_path):
    save(random_init(MultiLoraConfig, share=share, num_experts=3), tmp_path)
    adapter = AdapterFile(tmp_path, "x")
    factors = adapter.read("layers.0.v")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    A = stored["base_model.model.layers.0.v.braidlora_A.weight"]
    B = stored["base_model.model.layers.0.v.braidlora_B.weight"]
    assert (len(factors.A), len(factors.B), factors.rank) == (many_A, many_B, 3)
    for i in range(many_A):
        assert torch.equal(factors.A[i], A[3 * i : 3 * i + 3])
    for i in range(many_B):
        assert torch.equal(factors.B[i], B[:, 3 * i : 3 * i + 3])
    assert len(factors.updates) == 3


def test_dora_has_no_update_of_its_own(tmp_path):
    save(random_init(peft.LoraConfig, use_dora=True), tmp_path)
    assert AdapterFile(tmp_path, "x").read("layers.0.q").scaling is None


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("bert.encoder.layer.11.attention.self.query", 11, "attention.self.query"),
        ("model.layers.0.block_sparse_moe.experts.7.w1", 0, "block_sparse_moe.experts.7.w1"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_names_tell_layer_and_module(name, layer, module):
    assert LayerName.of(name) == LayerName(name, layer, module)


def test_layers_are_in_the_order_of_their_numbers():
    names = [f"model.layers.{i}.q" for i in (10, 9, 2)] + ["lm_head"]
    found = sorted((LayerName.of(name) for name in names), key=lambda layer: layer.order)
    assert [layer.layer for layer in found] == [2, 9, 10, None]


def change_config(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q_A, Q_B = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (pickled, "as a pickle"),
        (cut_short, "damaged or truncated"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (
            lambda folder: change_config(folder, peft_type="IA3"),
            "a IA3 adapter; only those with an A and a B",
        ),
        (lambda folder: change_config(folder, lora_alpha=None), "damaged: it has lora_alpha: None"),
        (
            lambda folder: change_config(folder, peft_type="BRAIDLORA", share="C", num_experts=0),
            "num_experts: 0, share: 'C'",
        ),
        (lambda folder: change_weights(folder, lambda t: t.pop(Q_B)), "layers.0.q has no B"),
        (lambda folder: change_weights(folder, lambda t: t.clear()), "no A and B of linear layers"),
        (
            lambda folder: change_weights(folder, lambda t: t.update({Q_A: torch.ones(2, 12)})),
            r"layers.0.q has A \(2, 12\), B \(10, 3\)",
        ),
        (
            lambda folder: change_config(folder, peft_type="BRAIDLORA", share="B", num_experts=2),
            r"share 'B', 2 experts",
        ),
        (
            lambda folder: change_weights(folder, lambda t: t[Q_A].fill_(float("nan"))),
            "lora_A.weight contains NaN",
        ),
    ],
)
def test_what_is_refused(spoil, says, tmp_path):
    save(random_init(peft.LoraConfig), tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        AdapterFile(tmp_path, "x").read("layers.0.q")


def test_factors_of_a_factored_lora_that_do_not_fit_are_named(tmp_path):
    save(random_init(FactoredLoraConfig, r_intermediate=4), tmp_path)
    key = "base_model.model.layers.1.v.factoredlora_M.weight"
    change_weights(tmp_path, lambda t: t.update({key: torch.ones(4, 2)}))
    with pytest.raises(CheckpointError, match=r"layers.1.v has A \(3, 12\), M \(4, 2\), B1 \(3, 4\)"):
        AdapterFile(tmp_path, "x")


@pytest.mark.parametrize(
    ("paths", "code", "says"),
    [
        (["nowhere"], 2, "nowhere: no such run, adapter or model"),
        (["empty"], 5, "empty: neither an adapter (adapter_config.json"),
        (["compared"], 5, "Its adapters are in subfolders: compared/cells/alora-seed0."),
        (["federated"], 5, "federated: this federation is not finished"),
        (["one"], 2, "has nothing to compare"),
        (["one", "./one"], 2, "given twice"),
        (["one", "wider"], 5, "maps 12 to 10 features in one, and 14 to 10 in wider"),
        (["one", "elsewhere"], 5, "no layer in common: one has layers.0.q"),
    ],
)
def test_the_command_says_what_does_not_fit(paths, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "compared" / "cells" / "alora-seed0").mkdir(parents=True)
    (tmp_path / "federated" / "clients").mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "experiment.json"):
        (tmp_path / "federated" / name).write_text("federation: {}\n")
    for name in ("one", "wider", "elsewhere"):
        save(random_init(peft.LoraConfig), tmp_path / name)
    change_weights(tmp_path / "wider", lambda t: t.update({Q_A: torch.ones(3, 14)}))
    renamed = {}
    change_weights(tmp_path / "elsewhere", lambda t: renamed.update(t) or t.clear() or t.update(
        {key.replace("layers", "blocks"): value for key, value in renamed.items()}
    ))  # fmt: skip
    assert main(["analyze", *paths]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""Clients' models after a federation, exported: heterogeneous Fed-ALoRA, stacking, and a classification head."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import braidlora  # noqa: F401  # registers the clients' adapter type
from braidlora.cli import main
from braidlora.errors import CheckpointError, ConfigError
from braidlora.export.run import export
from braidlora.federated.simulation.driver import federate
from braidlora.tasks import LabelSpace
from helpers.tiny_base import TASKS

IDS = torch.tensor([[5, 9, 20, 7], [8, 8, 2, 11]])


def logits(folder, base, auto=AutoModelForCausalLM, **options):
    network = auto.from_pretrained(base, **options)
    return PeftModel.from_pretrained(network, folder).eval()(IDS).logits


@pytest.mark.parametrize("rule", ["fed-alora-het", "flora"])
def test_a_clients_model_loads_with_plain_peft(rule, make_config, tiny_base, capsys):
    config = make_config(rule=rule, ranks=[2, 4, 3], rounds=2)
    run = federate(config, progress=False).directory
    for name in TASKS:
        target = run / "clients" / name
        assert main(["export", str(target), "--json"]) == 0
        out = run / "clients" / f"{name}-lora"
        lora = PeftConfig.from_pretrained(out)
        assert type(lora) is LoraConfig
        if rule == "fed-alora-het":
            assert (lora.r, lora.lora_alpha) == (16, 2 * 16)  # rank m, alpha = s·m
        expected = logits(target / "adapter", tiny_base)
        assert (expected - AutoModelForCausalLM.from_pretrained(tiny_base)(IDS).logits).abs().max() > 1e-4
        torch.testing.assert_close(logits(out, tiny_base), expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"each client has its own model. Give one of them: .*len, rev, up"):
        export(run)
    assert main(["evaluate", str(run)]) == 2
    assert "a federation; each client has its own model" in capsys.readouterr().err
    (run / "clients" / "up" / "adapter" / "manifest.json").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        export(run / "clients" / "up", run / "again")


def test_a_classifying_clients_head_is_merged_with_the_base(make_config, tiny_base, tmp_path):
    config = make_config(kind="classify", rule="fed-alora-het", ranks=[2, 4, 3], rounds=1)
    run = federate(config, progress=False).directory
    export(run / "clients" / "rev", tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    labels = LabelSpace.parse("labels.json", (run / "labels.json").read_bytes()).id2label
    assert merged.config.id2label == labels
    torch.manual_seed(0)  # the head is drawn here, and replaced by the trained one
    expected = logits(
        run / "clients" / "rev" / "adapter",
        tiny_base,
        AutoModelForSequenceClassification,
        num_labels=len(labels),
    )
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=0)
    other = tmp_path / "other"
    network = AutoModelForCausalLM.from_pretrained(tiny_base)
    network.model.embed_tokens.weight.data.mul_(2.0)
    network.save_pretrained(other)
    for file in tiny_base.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="trained on a different base model"):
        export(run / "clients" / "rev", tmp_path / "again", merge=True, base=str(other))

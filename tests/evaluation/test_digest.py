"""What tells predictions of one model from those of another."""

import peft
import torch
import transformers

from braidlora.evaluation.digest import model_digests


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
    )


def test_a_classifiers_adapter_is_the_same_once_it_is_loaded(tmp_path):
    """So that a run's own predictions are used again."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(classifier(), config)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    assert len(loaded.peft_config["default"].modules_to_save) > len(config.modules_to_save)  # PEFT's doing
    assert model_digests(loaded) == model_digests(model)
    with torch.no_grad():
        loaded.classifier.modules_to_save["default"].bias += 1
    assert model_digests(loaded)["adapter"] != model_digests(model)["adapter"]


def test_every_weight_and_every_setting_of_the_base_counts():
    """One weight far from any sample, a tolerance of its norms, an activation: other answers, so another digest."""
    first = model_digests(classifier())["base"]
    assert model_digests(classifier())["base"] == first
    changed = classifier()
    with torch.no_grad():
        changed.bert.encoder.layer[0].output.dense.weight.view(-1)[37] += 1e-4
    found = {model_digests(changed)["base"]}
    for key, value in (("layer_norm_eps", 1e-3), ("hidden_act", "relu")):
        changed = classifier()
        setattr(changed.config, key, value)
        found.add(model_digests(changed)["base"])
    found.add(model_digests(classifier().bfloat16())["base"])
    assert len(found | {first}) == 5
    named = classifier()
    named.config.id2label, named.config.use_cache = {0: "a", 1: "b", 2: "c"}, False
    named.config._name_or_path = "elsewhere"
    assert model_digests(named)["base"] == first

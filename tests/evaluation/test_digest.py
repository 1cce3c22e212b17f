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

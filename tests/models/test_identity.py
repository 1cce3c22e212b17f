"""Which base a model is, against the record of a run: other weights and settings are refused, other forms warned of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from braidlora.config import ModelSection
from braidlora.models.base import load_base
from braidlora.models.fingerprint import base_fingerprint
from braidlora.models.identity import architecture, base_differences, base_record
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.runs import BaseRecord
from braidlora.tasks import LabelSpace
from helpers.tiny_base import build_base

LABELS = LabelSpace({"t": ["x", "y", "z"]})


def record(folder, kind="generate", **section):
    made = ModelSection(path=str(folder), **section)
    model, _ = load_base(made, LABELS if kind == "classify" else None)
    return base_record(model, made), sampled_fingerprint(model)


@pytest.fixture
def copy(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "copy")


def test_a_copy_in_another_dtype_or_with_another_head_is_the_same_base(tiny_base, copy):
    first, sampled = record(tiny_base)
    again, _ = record(copy)
    assert again.fingerprint == first.fingerprint
    assert base_differences(first.model_dump(), again, sampled) == ([], [])
    half, _ = record(copy, dtype="bfloat16")
    assert half.fingerprint == first.fingerprint
    assert base_differences(first.model_dump(), half, sampled) == (
        [],
        ["the base's dtype was float32, is bfloat16"],
    )
    four_bit = first.model_copy(update={"quantization": "4bit"})
    notes = base_differences(four_bit.model_dump(), again, sampled)
    assert notes == ([], ["the base's quantization was 4bit, is none"])
    for seed in (0, 1):
        torch.manual_seed(seed)
        classifier, _ = record(copy, "classify")
        assert classifier.fingerprint == first.fingerprint


def test_one_weight_that_the_sampled_fingerprint_did_not_see(tiny_base, copy):
    path = copy / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name].view(-1)[1] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    (first, sampled), (changed, sampled_again) = record(tiny_base), record(copy)
    assert sampled == sampled_again  # why: 64 of 8192 values
    problems, _ = base_differences(first.model_dump(), changed, sampled_again)
    assert len(problems) == 1
    assert f"base model: {tiny_base} (sha256:" in problems[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
    ],
)
def test_settings_that_change_the_function_are_part_of_the_base(key, value, tiny_base, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    (first, _), (changed, sampled) = record(tiny_base), record(copy)
    assert changed.fingerprint == first.fingerprint
    problems, _ = base_differences(first.model_dump(), changed, sampled)
    assert len(problems) == 1
    assert f"base model: {key}" in problems[0]


def test_settings_that_change_nothing_are_not(tiny_base, copy):
    config = json.loads((copy / "config.json").read_text())
    changed = {"use_cache": False, "transformers_version": "9", "_name_or_path": "x", "eos_token_id": 7}
    (copy / "config.json").write_text(json.dumps(config | changed))
    (first, _), (again, sampled) = record(tiny_base), record(copy, attention="eager")
    assert base_differences(first.model_dump(), again, sampled) == ([], [])


def test_settings_become_plain_json():
    config = {
        "time_step_limit": (0.0, float("inf")),
        3: {"b": {2, 1}, "a": None},
        "dtype": "x",
        "kind": torch.float16,
    }
    plain = architecture(config)
    assert plain == {"3": {"b": [1, 2]}, "kind": "torch.float16", "time_step_limit": [0.0, "inf"]}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_setting_that_one_version_alone_writes_is_no_difference(tiny_base):
    first, sampled = record(tiny_base)
    old = first.model_dump()
    old["architecture"] = {"hidden_size": 64, "of_another_version": 3}
    assert base_differences(old, first, sampled) == ([], [])


def test_records_of_0_1_are_recognised(tiny_base, tmp_path):
    now, sampled = record(tiny_base)
    assert len(sampled) == 16
    assert base_differences(sampled, now, sampled) == ([], [])
    assert base_differences({"path": "x", "fingerprint": sampled}, now, sampled) == ([], [])
    other, other_sampled = record(build_base(tmp_path, seed=1))
    problems, _ = base_differences({"path": "x", "fingerprint": sampled}, other, other_sampled)
    assert problems == [f"base model: x ({sampled}) then, {tmp_path} ({other_sampled}) now"]
    problems, notes = base_differences(sampled, other, other_sampled, same_form=False)
    assert problems == []
    assert "cannot be compared in another dtype" in notes[0]


def test_weights_without_a_file_are_known_by_what_is_in_memory(tiny_base, monkeypatch):
    monkeypatch.setattr("braidlora.models.fingerprint.local_folder", lambda section: None)
    section = ModelSection(path=str(tiny_base))
    assert base_fingerprint(section) is None
    model, _ = load_base(section)
    made = base_record(model, section)
    assert made.fingerprint == base_fingerprint(section, model)
    assert made.fingerprint.startswith("loaded-sha256:")
    assert BaseRecord.model_validate(made.model_dump()) == made
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[1] += 1e-3
    assert base_differences(made.model_dump(), base_record(model, section), "")[0]
    of_a_file = made.model_copy(update={"fingerprint": "sha256:" + "0" * 64})
    assert base_differences(of_a_file.model_dump(), made, "") != ([], [])  # not comparable, and said so

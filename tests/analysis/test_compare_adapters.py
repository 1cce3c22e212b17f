"""`braidlora analyze` on adapters: matrices, angles, chance, and where there is nothing to compare."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import random_init, save
from scipy.linalg import subspace_angles

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.analysis import analyze
from braidlora.cli import main
from braidlora.runs import AdapterCard, BaseRecord

PREFIX = "base_model.model."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of its own, with adapters to be put into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_adapters_against_scipy(folder, capsys):
    for seed, name in enumerate(("one", "other")):
        save(random_init(peft.LoraConfig), folder / name, seed)
    assert main(["analyze", "one", "other", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "runs" / "analysis" / "analysis.json").read_text())
    section = printed["similarity"]
    stored = [load_file(folder / name / "adapter_model.safetensors") for name in ("one", "other")]
    for factor, transpose in (("A", True), ("B", False)):
        found = section[factor]
        assert found["elements"] == ["one", "other"]
        assert [layer["name"] for layer in found["layers"]] == [
            f"layers.{i}.{m}" for i in (0, 1) for m in "qv"
        ]
        for layer in found["layers"]:
            X, Y = (t[f"{PREFIX}{layer['name']}.lora_{factor}.weight"].double().numpy() for t in stored)
            X, Y = (X.T, Y.T) if transpose else (X, Y)
            expected = subspace_angles(X, Y)
            (angles,) = layer["angles"]
            np.testing.assert_allclose(np.sort(np.deg2rad(angles["degrees"])), np.sort(expected), rtol=1e-5)
            assert layer["similarity"][0][1] == pytest.approx(np.mean(np.cos(expected) ** 2), rel=1e-5)
            assert layer["chance"][0][1] == pytest.approx(3 / X.shape[0], rel=1e-5)
        values = [layer["similarity"][0][1] for layer in found["layers"]]
        assert found["mean"][0][1] == pytest.approx(np.mean(values), rel=1e-5)
        assert found["modules"]["v"]["mean"][0][1] == pytest.approx(np.mean(values[1::2]), rel=1e-5)
        assert found["pairs"]["similarity"] == pytest.approx(found["mean"][0][1], rel=1e-5)


def test_experts_of_one_adapter(folder):
    save(random_init(MultiLoraConfig, share="B", num_experts=3), folder / "many")
    section = analyze(["many"])["similarity"]
    assert section["A"]["elements"] == ["many #1", "many #2", "many #3"]
    assert section["B"] is None


def test_adapters_of_different_kind_and_rank(folder):
    """A's of rank 3 (a LoRA and two experts) beside one of rank 2 inside a plain form of width 4."""
    save(random_init(peft.LoraConfig), folder / "plain")
    save(random_init(MultiLoraConfig, share="none", num_experts=2), folder / "experts")
    narrow = FactoredLoraConfig(target_modules=["q", "v"], r=2, r_intermediate=4, init_weights=False)
    save(narrow, folder / "factored")
    A = analyze(["plain", "experts", "factored"])["similarity"]["A"]
    assert A["elements"] == ["plain", "experts #1", "experts #2", "factored"]
    assert A["chance"][0][1] == pytest.approx(3 / 12, rel=1e-5)
    assert A["chance"][3] == pytest.approx([3 / 12, 3 / 12, 3 / 12, 2 / 12], rel=1e-5)
    tensors = load_file(folder / "factored" / "adapter_model.safetensors")
    own = tensors[PREFIX + "layers.0.q.factoredlora_A.weight"].double().numpy()
    other = load_file(folder / "plain" / "adapter_model.safetensors")
    other = other[PREFIX + "layers.0.q.lora_A.weight"].double().numpy()
    expected = np.mean(np.cos(subspace_angles(own.T, other.T)) ** 2)
    assert A["layers"][0]["similarity"][3][0] == pytest.approx(expected, rel=1e-4)


def test_the_same_subspace_in_another_basis(folder):
    save(random_init(peft.LoraConfig), folder / "one")
    save(random_init(peft.LoraConfig), folder / "turned")
    path = folder / "turned" / "adapter_model.safetensors"
    mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0], [1.0, 0.0, 1.0]])
    tensors = load_file(path)
    save_file({k: mixing @ v if "lora_A" in k else v for k, v in tensors.items()}, path)
    section = analyze(["one", "turned"])["similarity"]
    assert section["A"]["mean"][0][1] == pytest.approx(1.0, abs=1e-6)
    assert section["B"]["mean"][0][1] == pytest.approx(1.0, abs=1e-6)


def test_a_zero_or_thin_matrix_is_null_with_the_reason(folder, capsys):
    save(peft.LoraConfig(target_modules=["q", "v"], r=3), folder / "new")
    save(random_init(peft.LoraConfig), folder / "trained")
    path = folder / "trained" / "adapter_model.safetensors"
    tensors = load_file(path)
    thin = tensors[PREFIX + "layers.0.q.lora_B.weight"]
    thin[:, 2] = thin[:, 0] - thin[:, 1]
    save_file(tensors, path)
    B = analyze(["new", "trained"])["similarity"]["B"]
    assert B["mean"][0] == [None, None]
    assert B["pairs"]["similarity"] is None
    assert B["layers"][0]["reasons"] == {"0": "all zero", "1": "rank 2, not 3"}
    assert B["layers"][1]["reasons"] == {"0": "all zero"}
    assert B["layers"][1]["similarity"][1][1] == 1.0
    assert main(["analyze", "new", "trained"]) == 0
    assert "not defined, B is all zero" in capsys.readouterr().out


def test_layers_that_not_all_have_are_named(folder, capsys):
    save(random_init(peft.LoraConfig), folder / "both")
    save(peft.LoraConfig(target_modules=["q"], r=3, init_lora_weights=False), folder / "q-alone")
    section = analyze(["both", "q-alone"])["similarity"]
    assert section["left_out"] == {"both": ["layers.0.v", "layers.1.v"]}
    assert [layer["name"] for layer in section["A"]["layers"]] == ["layers.0.q", "layers.1.q"]


def test_adapters_of_different_bases_are_compared_with_a_warning(folder):
    for name, digit in (("one", "0"), ("same", "0"), ("other", "1")):
        save(random_init(peft.LoraConfig), folder / name)
        base = BaseRecord(path="x", fingerprint="sha256:" + digit * 64)
        AdapterCard(braidlora="1", tasks=[], base=base).write(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analyze(["one", "same"])
    with pytest.warns(UserWarning, match="one and other were trained on different bases"):
        analyze(["one", "same", "other"])


def test_labels_are_as_long_as_they_must_be(folder):
    for path in ("a/adapter", "b/adapter"):
        save(random_init(peft.LoraConfig), folder / path)
    assert analyze(["a/adapter", "b/adapter"])["similarity"]["A"]["elements"] == ["a/adapter", "b/adapter"]


def test_the_table_for_people(folder, capsys):
    for seed, name in enumerate(("one", "other")):
        save(random_init(peft.LoraConfig), folder / name, seed)
    assert main(["analyze", "one", "other", "--output", "seen"]) == 0
    said = capsys.readouterr().out
    written = json.loads((folder / "seen" / "analysis.json").read_text())
    A = written["similarity"]["A"]["pairs"]
    assert f"{A['similarity']:.3f} between pairs, chance {A['chance']:.3f}" in said
    assert [figure["name"] for figure in written["figures"]] == ["similarity", "similarity-layers"]
    assert {path.name for path in (folder / "seen").iterdir()} == {
        "analysis.json", "similarity.png", "similarity.svg", "similarity-layers.png", "similarity-layers.svg",
    }  # fmt: skip

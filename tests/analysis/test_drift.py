"""Drift of real runs against whole matrices in numpy, and nulls that give their reason."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from braidlora.analysis.drift import find_change, measure_drift
from braidlora.cli import main
from braidlora.config import RunConfig
from braidlora.one_run import train
from braidlora.runs import RunDirectory
from braidlora.training.trainer import MultiTaskTrainer

LAYER = "model.layers.1.self_attn.v_proj"


def factors(folder, layer=LAYER, prefix="lora"):
    tensors = load_file(folder / "adapter_model.safetensors")
    return (tensors[f"base_model.model.{layer}.{prefix}_{f}.weight"].double().numpy() for f in "AB")


def reference(X, Y):
    """Relative change of the column norms, mean of 1 − cosine."""
    before, after = np.linalg.norm(X, axis=0), np.linalg.norm(Y, axis=0)
    cosines = (X * Y).sum(0) / (before * after)
    return np.abs(after - before).sum() / before.sum(), np.mean(1 - cosines)


def layer_of(change, name=LAYER):
    return next(layer for layer in change["layers"] if layer["name"] == name)


@pytest.fixture(scope="module")
def lora(runs):
    return runs("lora")


@pytest.fixture(scope="module")
def drift(lora):
    return measure_drift(RunDirectory(lora))


def test_what_is_compared(drift):
    assert drift["stages"] == ["adapter_init", "step-4", "step-8", "step-12", "adapter"]
    assert (drift["steps"], drift["last_step"]) == ([0, 4, 8, 12, 12], 12)
    assert (drift["since_start"], drift["since_warmup"]) == ("adapter_init", "step-4")
    assert "reasons" not in drift


def test_since_the_start(drift, lora):
    cell = layer_of(find_change(drift, "adapter_init"))["A"][0]
    (before, _), (after, _) = factors(lora / "adapter_init"), factors(lora / "adapter")
    magnitude, direction = reference(before, after)
    assert cell["magnitude"] == pytest.approx(magnitude, rel=1e-9)
    assert cell["direction"] == pytest.approx(direction, rel=1e-9)
    assert cell["norm_after"] == pytest.approx(np.linalg.norm(after))
    assert 0 < cell["direction"] < 1
    assert cell["chance"] == 4 / 64 < cell["similarity"] < 1


@pytest.mark.parametrize("factor", ["B", "delta"])
def test_zero_has_no_direction(drift, factor):
    change = find_change(drift, "adapter_init")
    cell = layer_of(change)[factor][0]
    assert cell["magnitude"] is cell["direction"] is cell["similarity"] is None
    assert cell["norm_before"] == 0.0 < cell["norm_after"]
    assert "B is zero in adapter_init" in cell["reason"]
    assert change["mean"][factor]["direction"] is None
    assert "B is zero in adapter_init" in change["mean"][factor]["reason"]


def test_since_warmup(drift, lora):
    found = layer_of(find_change(drift, "step-4"))
    (A0, B0), (A1, B1) = factors(lora / "checkpoints" / "step-4"), factors(lora / "adapter")
    scaling = 16 / 4
    for cell, X, Y in ((found["B"][0], B0, B1), (found["delta"][0], scaling * B0 @ A0, scaling * B1 @ A1)):
        magnitude, direction = reference(X, Y)
        assert cell["magnitude"] == pytest.approx(magnitude, rel=1e-9)
        assert cell["direction"] == pytest.approx(direction, rel=1e-9)
        assert cell["norm_before"] == pytest.approx(np.linalg.norm(X), rel=1e-9)


def test_means_are_over_the_layers(drift):
    change = find_change(drift, "step-4")
    values = [cell["direction"] for layer in change["layers"] for cell in layer["B"]]
    assert len(values) == 4
    assert change["mean"]["B"]["direction"] == pytest.approx(np.mean(values))


def test_every_expert_has_its_own(runs):
    change = find_change(measure_drift(RunDirectory(runs("alora"))), "step-4")
    layer = change["layers"][0]
    assert [len(layer[factor]) for factor in ("A", "B", "delta")] == [3, 1, 3]
    folders = runs("alora") / "checkpoints" / "step-4", runs("alora") / "adapter"
    (A0, B0), (A1, B1) = (factors(folder, layer["name"], "braidlora") for folder in folders)
    _, direction = reference(B0 @ A0[8:12], B1 @ A1[8:12])
    assert layer["delta"][2]["direction"] == pytest.approx(direction, rel=1e-9)


def test_a_run_without_a_checkpoint_on_the_way(recipe, tmp_path, capsys):
    made = recipe(output=str(tmp_path / "run"))
    made["training"] = {**made["training"], "save_steps": 1000}
    made["adapter"] = {**made["adapter"], "method": "lora"}
    train(RunConfig.model_validate(made), progress=False)
    assert main(["analyze", str(tmp_path / "run"), "--output", str(tmp_path / "seen")]) == 0
    assert (
        "no checkpoint was saved between the end of warm-up (step 3) and the end" in capsys.readouterr().out
    )
    written = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    drift = written["drift"]["run"]
    assert drift["since_warmup"] is None
    assert "training.save_steps" in drift["reasons"]["since_warmup"]
    assert find_change(drift, "adapter_init")["mean"]["A"]["direction"] > 0
    assert written["similarity"] is None  # one plain LoRA


@pytest.mark.parametrize(("warmup", "reference"), [(3, "step-4"), (6, "step-8")])
def test_an_adapter_from_before_the_end_stands_at_its_step(
    warmup, reference, recipe, tmp_path, monkeypatch, capsys
):
    """`load_best` took step 4; the end of training is still that of step 12, and no change goes back in time."""
    made = recipe(output=str(tmp_path / "run"), split={"test": 0.1, "validation": 0.1})
    made["training"] |= {"load_best": True, "eval_steps": 4, "warmup_steps": warmup, "keep_checkpoints": 3}
    made["adapter"] |= {"method": "lora"}

    def growing(trainer, *args, **kwargs):
        metrics = {"eval_loss": float(trainer.state.global_step)}
        trainer.log(dict(metrics))
        trainer.notify_evaluated(metrics)
        return metrics

    monkeypatch.setattr(MultiTaskTrainer, "evaluate", growing)
    run = RunDirectory(tmp_path / "run")
    train(RunConfig.model_validate(made), progress=False, evaluate=False)
    for one, other in zip(factors(run.adapter), factors(run.checkpoint(4)), strict=True):
        np.testing.assert_array_equal(one, other)
    drift = measure_drift(run)
    assert drift["stages"] == ["adapter_init", "step-4", "adapter", "step-8", "step-12"]
    assert (drift["steps"], drift["last_step"]) == ([0, 4, 4, 8, 12], 12)
    at = dict(zip(drift["stages"], drift["steps"], strict=True))
    assert drift["since_warmup"] == reference
    assert all(at[change["from"]] < at[change["to"]] for change in drift["changes"])
    assert find_change(drift, reference, "step-12")["mean"]["B"]["direction"] > 0
    assert main(["analyze", str(run.path), "--output", str(tmp_path / "seen")]) == 0
    said = capsys.readouterr().out
    assert "measured up to step-12; its adapter is that of step 4 of 12" in said


def test_a_run_without_its_beginning(lora, tmp_path, capsys):
    shutil.copytree(lora, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter_init")
    drift = measure_drift(RunDirectory(tmp_path / "run"))
    assert drift["since_start"] is None
    assert "adapter_init was not saved" in drift["reasons"]["since_start"]
    assert find_change(drift, "step-4")["mean"]["B"]["direction"] > 0


def test_a_run_that_did_not_finish(lora, tmp_path, capsys):
    shutil.copytree(lora, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert main(["analyze", str(tmp_path / "run")]) == 5
    assert "no adapter yet" in capsys.readouterr().err


def test_a_damaged_checkpoint(lora, tmp_path, capsys):
    shutil.copytree(lora, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-4" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["analyze", str(tmp_path / "run")]) == 5
    assert "changed since it was written" in capsys.readouterr().err

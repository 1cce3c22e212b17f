"""The attack by a loss threshold: its AUC and interval against direct counts, and what it finds in real models."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy.stats import mannwhitneyu

from braidlora.analysis import analyze, membership
from braidlora.analysis.membership import Auc, Stratum, auc, interval, section_of, strata
from braidlora.cli import main
from braidlora.config import RunConfig
from braidlora.models.loading import load_for_evaluation
from braidlora.one_run import train
from braidlora.training.trainer import MultiTaskTrainer


def test_auc_against_all_pairs():
    draw = np.random.default_rng(0)
    held_in, held_out = draw.integers(0, 6, 40) / 4, draw.integers(1, 8, 25) / 4  # with ties
    pairs = [(a < b) + 0.5 * (a == b) for a in held_in for b in held_out]
    found = auc(held_in, held_out)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.value == pytest.approx(mannwhitneyu(held_out, held_in).statistic / (40 * 25))


def test_the_interval_covers_the_true_auc():
    """Normal losses of different means, whose AUC is Φ(δ / √2): 95% of the intervals contain it, also near 1."""
    from scipy.stats import norm

    draw = np.random.default_rng(1)
    for shift in (0.0, 0.8, 2.5):
        truth, hits, times = norm.cdf(shift / np.sqrt(2)), 0, 400
        for _ in range(times):
            low_high = interval([auc(draw.normal(0, 1, 40), draw.normal(shift, 1, 30))])
            hits += low_high.low <= truth <= low_high.high
        assert 0.91 <= hits / times <= 1.0, shift


def test_the_bounds_are_where_the_score_is_z_errors_away():
    found = interval([Auc(0.8, 30, 20)])
    for theta in (found.low, found.high):
        inner = 1 + 24 * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        error = np.sqrt(theta * (1 - theta) * inner / 600)
        assert abs(0.8 - theta) / error == pytest.approx(1.959964, rel=1e-5)
    perfect = interval([Auc(1.0, 30, 20)])
    assert perfect.high == 1.0
    assert 0.8 < perfect.low < 0.98, "rows are few, however clear they are"


def test_strata_are_compared_within_themselves():
    """A task whose losses are all larger must not look like rows that were not trained on."""
    draw = np.random.default_rng(2)
    easy, hard = (
        Stratum(name, draw.normal(mean, 1, (n, 2)), draw.normal(mean, 1, (m, 2)), 0)
        for name, mean, n, m in (("easy", 0, 200, 50), ("hard", 9, 50, 200))
    )
    found = section_of([easy, hard], "x")
    assert found["loss"]["low"] < 0.5 < found["loss"]["high"]
    pooled = auc(*(np.concatenate([getattr(one, part)[:, 0] for one in (easy, hard)])
                   for part in ("held_in", "held_out")))  # fmt: skip
    assert pooled.value > 0.7
    more = interval([Auc(0.7, 100, 100)] * 4)
    assert more.auc == pytest.approx(0.7)
    assert more.high - more.low < interval([Auc(0.7, 100, 100)]).high - interval([Auc(0.7, 100, 100)]).low


@pytest.fixture(scope="module")
def overfitted(recipe, tmp_path_factory):
    """Answers at random, which can only be memorized; few rows, many epochs."""
    folder, draw = tmp_path_factory.mktemp("overfitted"), random.Random(0)
    for name in ("one", "two"):
        rows = [
            {"instruction": "up", "input": "".join(draw.choices("abcdef", k=5)),
             "output": "".join(draw.choices("ABCDEF", k=4))}
            for _ in range(60)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(
        output=str(folder / "run"),
        adapter={"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0,
                 "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        tasks=[{"name": name, "train": str(folder / f"{name}.jsonl")} for name in ("one", "two")],
        split={"test": 0.5},
        training={"epochs": 80, "batch_size": 20, "learning_rate": 0.01, "warmup_steps": 0,
                  "scheduler": "constant", "save_steps": 1000},
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    train(RunConfig.model_validate(made), progress=False, evaluate=False)
    return folder


def test_the_leak_of_an_overfitted_adapter_is_found(overfitted, tmp_path, capsys):
    run = str(overfitted / "run")
    assert main(["analyze", run, "--membership", f"--output={tmp_path / 'a'}"]) == 0
    said = capsys.readouterr().out
    [found] = json.loads((tmp_path / "a/analysis.json").read_text())["membership"].values()
    assert found["loss"]["low"] > 0.7
    assert found["base"]["low"] < 0.5 < found["base"]["high"]
    assert found["verdict"].startswith("leak")
    assert "leak: training rows have smaller losses than others." in said
    assert f"{found['loss']['auc']:.3f} [" in said
    # The same run before it was trained does not leak.
    assert (
        main(["analyze", f"{run}/adapter_init", "--membership", f"--output={tmp_path / 'b'}", "--json"]) == 0
    )
    [start] = json.loads(capsys.readouterr().out)["membership"].values()
    assert start["loss"]["low"] < 0.5 < start["loss"]["high"]
    assert start["verdict"].startswith("no leak found")
    assert start["held_in"] == 60


def test_an_adapter_folder_takes_its_rows_from_a_recipe(overfitted, tmp_path, capsys):
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(overfitted / "run/adapter", alone)
    assert main(["analyze", str(alone), "--membership", f"--output={tmp_path / 'a'}"]) == 2
    assert "does not record its rows" in capsys.readouterr().err
    words = ["analyze", str(alone), "--membership", f"--recipe={overfitted / 'recipe.yaml'}"]
    assert main([*words, f"--output={tmp_path / 'a'}", "--json"]) == 0
    [own] = json.loads(capsys.readouterr().out)["membership"].values()
    [run] = analyze([overfitted / "run"], membership=True, rows=500)["membership"].values()
    assert own["loss"]["auc"] == pytest.approx(run["loss"]["auc"], abs=1e-5)


def test_losses_are_those_of_each_row_alone(overfitted):
    loaded = load_for_evaluation(overfitted / "run")
    [found] = [one for one in strata(loaded, loaded.tasks, 9) if one.task == "one"]
    assert found.held_in.shape == found.held_out.shape == (9, 2)
    task = next(one for one in loaded.tasks if one.name == "one")
    from dataclasses import replace

    from braidlora.tasks import encode_tasks

    expected = []
    for row in task.train:
        alone = [replace(one, train=[row] if one is task else []) for one in loaded.tasks]
        one = encode_tasks(alone, loaded.tokenizer, loaded.config.prompt, "train", None)[0]
        ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
        pair = []
        for model in (loaded.model, None):
            with torch.no_grad():
                if model is None:
                    with loaded.model.disable_adapter():
                        logits = loaded.model(input_ids=ids).logits
                else:
                    logits = model(input_ids=ids).logits
            pair.append(float(F.cross_entropy(logits[0, :-1], labels[0, 1:])))
        expected.append(pair)
    for row in found.held_in:
        assert min(np.abs(np.array(expected) - row).max(1)) < 1e-5


def test_held_out_rows_that_were_trained_on_are_not_counted(recipe, material, tmp_path):
    made = recipe(output=str(tmp_path / "run"), adapter={"method": "lora", "target_modules": ["q_proj"]})
    made["tasks"] = [{**made["tasks"][0], "test": made["tasks"][0]["train"]}]
    made.pop("split")
    made["training"] |= {"max_steps": 1, "warmup_steps": 0}
    train(RunConfig.model_validate(made), progress=False, evaluate=False)
    from braidlora.errors import DataError

    with pytest.raises(DataError, match="not trained on"):
        analyze([tmp_path / "run"], membership=True)


def unpadded(ids, mask):
    return {tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)}


@pytest.fixture(scope="module")
def stopped_early(recipe, tmp_path_factory):
    """Three steps of four rows, two tasks of three, and the rows that reached the model, after each step."""
    made = recipe(
        output=str(tmp_path_factory.mktemp("early") / "run"),
        adapter={"method": "lora", "target_modules": ["q_proj"]},
        mixing={"strategy": "weights", "weights": {"up": 1.0, "rev": 3.0, "len": 0.0}},
        training={"max_steps": 3, "save_steps": 1, "keep_checkpoints": 3, "batch_size": 2, "warmup_steps": 0,
                  "gradient_accumulation": 2},
    )  # fmt: skip
    batches, step = [], MultiTaskTrainer.training_step

    def watched(trainer, model, inputs, *args, **kwargs):
        batches.append(unpadded(inputs["input_ids"], inputs["attention_mask"]))
        return step(trainer, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "training_step", watched)
        train(RunConfig.model_validate(made), progress=False, evaluate=False)
    by_step = [batches[0] | batches[1], batches[2] | batches[3], batches[4] | batches[5]]
    return made, [set.union(*by_step[: at + 1]) for at in range(3)]


@pytest.mark.parametrize(("place", "steps"), [("", 3), ("adapter", 3), ("checkpoints/step-1", 1)])
def test_held_in_are_only_rows_that_were_trained_on(place, steps, stopped_early, monkeypatch):
    made, reached = stopped_early
    measured, losses = [], membership._losses
    monkeypatch.setattr(
        membership, "_losses", lambda loaded, task, rows: measured.append(rows) or losses(loaded, task, rows)
    )
    [found] = analyze([f"{made['output']}/{place}"], membership=True, rows=500)["membership"].values()
    assert {tuple(row["input_ids"]) for part in measured[::2] for row in part} == reached[steps - 1]
    assert len(reached[steps - 1]) <= found["held_in"] <= 4 * steps
    assert "len" not in found["tasks"]
    count = found["tasks"]["rev"]["held_in"]
    assert f"task rev: {count} of its 22 training rows were trained on by step {steps}; only these" in str(
        found["notes"]
    )
    assert (
        f"task len: 0 of its 14 training rows were trained on by step {steps}; so it is left out"
        in (found["notes"])
    )


def test_tasks_with_too_few_trained_rows_are_named(stopped_early, tmp_path, capsys):
    made, _ = stopped_early
    words = ["analyze", made["output"], "--membership", f"--output={tmp_path / 'a'}", "--rows-per-task=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "task len: 0 of its 14 training rows were trained on by step 3; so it is left out." in said
    assert "task rev" not in said, "it has more than were asked for"


def test_other_training_rows_than_the_runs_are_refused(stopped_early, tmp_path, capsys):
    """It is unknown which of them the run would have drawn."""
    made, _ = stopped_early
    words = ["analyze", made["output"], "--membership", f"--output={tmp_path / 'a'}"]
    assert main([*words, "--tasks.up.train.limit=9"]) == 3
    assert "the training rows of 'up' are not those in data.json" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(overfitted, tmp_path, capsys):
    run = str(overfitted / "run")
    for words, says in (
        ([run, "--recipe=demo"], "has no effect without it"),
        ([run, "--membership", "--recipe=demo"], "has a recipe of its own"),
        (["study", "demo", "--membership"], "does not apply to a study"),
    ):
        assert main(["analyze", *words, f"--output={tmp_path / 'x'}"]) == 2
        assert says in capsys.readouterr().err

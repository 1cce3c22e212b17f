"""Weights of labels in the loss of classifiers: against a float64 reference, and through a run and a federation."""

import json

import pytest
import torch

from braidlora.cli import main
from braidlora.config import RunConfig, dump_config
from braidlora.tasks import LabelSpace, load_tasks
from braidlora.tasks.class_weights import class_weights
from braidlora.training.loss import Losses


@pytest.fixture
def uneven(tmp_path):
    """Nine rows of one label and three of another, and a second task without weights."""

    def make(weights):
        rows = [
            {"text": "abc"[number % 3], "label": "rare" if number % 4 == 3 else "often"}
            for number in range(12)
        ]
        for name, content in (
            ("a", rows),
            ("b", [{"text": "x", "label": "often"}, {"text": "y", "label": "other"}]),
        ):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        tasks = [
            {"name": name, "kind": "classify", "train": str(tmp_path / f"{name}.jsonl")} for name in "ab"
        ]
        tasks[0]["class_weights"] = weights
        config = RunConfig.model_validate({"tasks": tasks})
        loaded = load_tasks(config)
        space = LabelSpace.of(loaded)
        return class_weights(config, loaded, space), space

    return make


def test_balanced_weights_are_n_over_k_n_c_with_mean_1(uneven):
    weights, space = uneven("balanced")
    often, rare = weights[0, space.index("often")], weights[0, space.index("rare")]
    assert (often.item(), rare.item()) == (pytest.approx(12 / (2 * 9)), pytest.approx(12 / (2 * 3)))
    assert (9 * often + 3 * rare).item() / 12 == pytest.approx(1.0)
    assert weights[1].tolist() == [1.0, 1.0, 1.0]


def test_given_weights_leave_other_labels_at_1_and_no_weights_cost_nothing(uneven):
    weights, space = uneven({"rare": 2.5})
    assert (weights[0, space.index("rare")], weights[0, space.index("often")]) == (2.5, 1.0)
    assert uneven(None)[0] is None


def test_the_loss_is_the_weighted_cross_entropy_over_the_tasks_own_labels(uneven):
    weights, space = uneven("balanced")
    torch.manual_seed(0)
    logits, task_id = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 0])
    labels = torch.tensor([space.index(one) for one in ("often", "rare", "often", "often", "other", "rare")])
    got = Losses(logits, labels, task_id, space, weights)
    for row in range(6):
        own = [space.index(label) for label in space.task_labels["ab"[task_id[row]]]]
        exact = logits[row, own].double()
        expected = torch.logsumexp(exact, 0) - logits[row, labels[row]].double()
        expected *= weights[task_id[row], labels[row]].double()
        assert got.values[row].double().item() == pytest.approx(expected.item(), rel=1e-5)
    assert got.counted.tolist() == [1.0] * 6


def adapter_bytes(path):
    return (path / "adapter_model.safetensors").read_bytes()


def test_a_run_with_weights_trains_another_adapter_and_resumes_only_as_itself(make_config, tmp_path, capsys):
    plain = make_config("plain", kind="classify", training__max_steps=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(plain), encoding="utf-8")
    for name, overrides in (("plain", []), ("weighted", ["--tasks.*.class_weights=balanced"])):
        assert main(["train", str(recipe), "--json", f"--output={tmp_path / name}", *overrides]) == 0
    metrics = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{", ""]))
    assert all({"accuracy", "macro_f1"} <= set(task) for task in metrics["tasks"].values())
    assert adapter_bytes(tmp_path / "plain" / "adapter") != adapter_bytes(tmp_path / "weighted" / "adapter")
    again = ["--resume=auto", "--tasks.*.class_weights=null"]
    assert main(["train", str(recipe), f"--output={tmp_path / 'weighted'}", *again]) == 5
    assert "class_weights" in capsys.readouterr().err

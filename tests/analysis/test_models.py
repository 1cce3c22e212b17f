"""Router use and gradients against rows run one by one, without padding and without our layers' own sums."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braidlora.adapters import for_tasks
from braidlora.analysis import analyze, analyze_run
from braidlora.analysis.batches import task_batches
from braidlora.analysis.gradients import measure_gradients
from braidlora.analysis.routers import measure_routers
from braidlora.cli import main
from braidlora.errors import DataError
from braidlora.models.loading import load_for_evaluation


@pytest.fixture(scope="module")
def loaded(runs):
    return load_for_evaluation(runs("alora"))


def rows_of(loaded, task, rows, parts):
    """(token ids, labels) of every row that a measurement takes, padding removed."""
    (batches,) = [found.batches for found in task_batches(loaded, rows, parts) if found.task == task]
    found = []
    for batch in batches:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            found.append((ids[mask.bool()][None], labels[mask.bool()][None]))
    return found


def test_rows_are_drawn_once_and_the_same_again(loaded):
    one, again = (task_batches(loaded, 5, ("train",)) for _ in range(2))
    assert [(task.task, task.part, task.rows) for task in one] == [
        (t, "train", 5) for t in ("up", "rev", "len")
    ]
    assert [[len(batch["input_ids"]) for batch in half] for half in one[0].halves] == [[3], [2]]
    for task, other in zip(one, again, strict=True):
        for batch, same in zip(task.batches, other.batches, strict=True):
            assert torch.equal(batch["input_ids"], same["input_ids"])
    assert [t["task_id"].unique().tolist() for task in one for t in task.batches] == [
        [0], [0], [1], [1], [2], [2],
    ]  # fmt: skip


def input_of(layer, model, ids):
    """What reaches the layer: (tokens, k)."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0][0]


def test_router_weights_are_those_of_every_token(loaded):
    section = measure_routers(loaded, rows=16)
    name = "model.layers.1.self_attn.q_proj"
    layer = loaded.model.get_submodule(f"base_model.model.{name}")
    entry = next(entry for entry in section["layers"] if entry["name"] == name)
    parts = ("test", "validation", "train")
    for at, task in enumerate(section["tasks"]):
        weights = []
        for ids, _ in rows_of(loaded, task, 16, parts):
            logits = (
                input_of(layer, loaded.model, ids).double()
                @ layer.braidlora_router["default"].weight.double().T
            )
            weights.append(torch.softmax(logits, -1))
        weights = torch.cat(weights)
        assert section["part"][task] == "test"
        assert section["tokens"][task] == len(weights)
        mean = weights.mean(0).detach().numpy()
        np.testing.assert_allclose(entry["weights"][at], mean, atol=1e-6)
        assert entry["entropy"][at] == pytest.approx(-(mean * np.log(mean)).sum() / np.log(3), abs=1e-6)
        token = -(weights * weights.log()).sum(-1).mean() / np.log(3)
        assert entry["token_entropy"][at] == pytest.approx(float(token), abs=1e-6)
        assert task in entry["serves"][int(mean.argmax())]
    one, two, three = map(np.array, entry["weights"])
    pairs = [(one, two), (one, three), (two, three)]
    assert entry["distance"] == pytest.approx(np.mean([np.abs(a - b).sum() / 2 for a, b in pairs]), abs=1e-9)
    assert sum(map(len, entry["serves"])) == 3


def test_watching_leaves_the_model_as_it_was(loaded):
    layers = [module for module in loaded.model.modules() if "MultiLora" in type(module).__name__]
    measure_routers(loaded, rows=2)
    measure_gradients(loaded, rows=2)
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def cosine(one, other):
    return float(F.cosine_similarity(one.double(), other.double(), dim=0))


def test_gradients_are_those_of_the_mean_loss_of_a_task(loaded):
    section = measure_gradients(loaded, rows=6)
    assert (section["shared"], section["dropout"], section["tasks"]) == (["B"], "off", ["up", "rev", "len"])
    named = {
        name: parameter
        for name, parameter in loaded.model.named_parameters()
        if "braidlora_B" in name and "layers.0" in name and "v_proj" in name
    }
    ((_, B),) = named.items()
    B.requires_grad_(True)
    gradients, halves = [], []
    for task in section["tasks"]:
        rows = rows_of(loaded, task, 6, ("train",))
        targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)
        sums = []
        for ids, labels in rows:
            # transformers' own loss of a row is the mean over its targets
            loss = loaded.model(input_ids=ids, labels=labels).loss * int((labels[:, 1:] != -100).sum())
            sums.append(torch.autograd.grad(loss, B)[0].flatten() / targets)
        gradients.append(sum(sums))
        halves.append((sum(sums[:3]), sum(sums[3:])))
    B.requires_grad_(False)
    found = next(
        entry
        for entry in section["factors"]["B"]["layers"]
        if entry["name"] == "model.layers.0.self_attn.v_proj"
    )
    for i, j in itertools.product(range(3), repeat=2):
        expected = cosine(*halves[i]) if i == j else cosine(gradients[i], gradients[j])
        assert found["cosine"][i][j] == pytest.approx(expected, abs=2e-4)
    assert found["norm"] == pytest.approx([float(g.norm()) for g in gradients], rel=1e-4)
    between = [found["cosine"][i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["between"] == pytest.approx(np.mean(between), abs=1e-9)


@pytest.mark.parametrize(
    ("method", "shared", "factors"),
    [
        ("alora", ["B"], {"A", "router", "B"}),
        ("hydralora", ["A"], {"A", "router", "B"}),
        ("lora", ["A", "B"], {"A", "B"}),
    ],
)
def test_which_factor_is_shared(method, shared, factors, runs):
    found = analyze([runs(method)], gradients=True, rows=2)["gradients"][method]
    assert found["shared"] == shared
    assert set(found["factors"]) == factors


def test_a_run_with_weights_by_task_is_analyzed(runs, tmp_path, capsys):
    """Each task's rows go through that task's weights, in every analysis that runs the model."""
    run = runs("mtl-lora")
    words = ["analyze", str(run), "--routers", "--gradients", "--membership", "--rows-per-task=6", "--json"]
    assert main([*words, f"--output={tmp_path / 'seen'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routers"] == {"mtl-lora": None}, "its gate reads the task, not the token"
    assert set(found["membership"]["mtl-lora"]["tasks"]) == {"up", "rev", "len"}
    loaded = load_for_evaluation(run)
    name = "model.layers.0.self_attn.v_proj"
    A = loaded.model.get_submodule(f"base_model.model.{name}").braidlora_A["default"].weight
    A.requires_grad_(True)
    norms = []
    for task in ("up", "rev", "len"):
        sums, targets = 0.0, 0
        for ids, labels in rows_of(loaded, task, 6, ("train",)):
            count = int((labels[:, 1:] != -100).sum())
            with for_tasks(task):
                loss = loaded.model(input_ids=ids, labels=labels).loss * count
            sums, targets = sums + torch.autograd.grad(loss, A)[0], targets + count
        norms.append(float((sums / targets).norm()))
    layers = found["gradients"]["mtl-lora"]["factors"]["A"]["layers"]
    assert next(one for one in layers if one["name"] == name)["norm"] == pytest.approx(norms, rel=1e-4)


def test_routers_behind_a_map_per_task_see_their_own_tasks(runs):
    loaded = load_for_evaluation(runs("alora", task_map=True))
    section = measure_routers(loaded, rows=6)
    name = "model.layers.1.self_attn.q_proj"
    layer = loaded.model.get_submodule(f"base_model.model.{name}")
    entry = next(entry for entry in section["layers"] if entry["name"] == name)
    for at, task in enumerate(section["tasks"]):
        weights = []
        for ids, _ in rows_of(loaded, task, 6, ("test",)):
            with for_tasks(task):
                weights.append(layer.expert_weights(input_of(layer, loaded.model, ids), "default"))
        np.testing.assert_allclose(entry["weights"][at], torch.cat(weights).mean(0).detach(), atol=1e-6)


def test_at_the_start_one_factor_has_no_gradient(runs, tmp_path, capsys):
    command = ["analyze", str(runs("lora") / "adapter_init"), "--gradients", "--rows-per-task=2"]
    assert main([*command, "--output", str(tmp_path / "seen")]) == 0
    assert "A: every task's gradient is zero" in capsys.readouterr().out
    written = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    A, B = (written["gradients"]["adapter_init"]["factors"][factor] for factor in "AB")
    assert A["norm"] == [0.0, 0.0, 0.0]
    assert A["between"] is None
    assert A["cosine"][0] == [None, None, None]
    assert "is zero here" in A["reason"]
    assert -1 <= B["between"] <= 1


def test_a_run_for_a_report(runs):
    found = analyze_run(runs("alora"), rows=4)
    assert found["similarity"]["A"]["elements"] == ["alora #1", "alora #2", "alora #3"]
    assert found["drift"]["alora"]["since_warmup"] == "step-4"
    assert found["routers"]["alora"]["experts"] == 3
    assert analyze_run(runs("lora"), rows=4)["routers"] == {"lora": None}


def test_one_row_cannot_be_halved(loaded):
    with pytest.raises(DataError, match="--rows-per-task=2 or more"):
        measure_gradients(loaded, rows=1)
    assert measure_routers(loaded, rows=1)["rows"] == {"up": 1, "rev": 1, "len": 1}


def test_a_classifier(recipe, material, tmp_path):
    """Labels are masked per task, and the pooled head is no adapted layer."""
    from braidlora.config import RunConfig
    from braidlora.one_run import train

    made = recipe(output=str(tmp_path / "run"), prompt={"cutoff": 24})
    made["tasks"] = [
        {"name": name, "kind": "classify", "train": str(material / "rows" / f"{name}-labels.jsonl")}
        for name in ("up", "len")
    ]
    made["training"] = {**made["training"], "max_steps": 4, "warmup_steps": 0}
    train(RunConfig.model_validate(made), progress=False)
    found = analyze([tmp_path / "run"], routers=True, gradients=True, rows=4)
    assert found["routers"]["run"]["tasks"] == ["up", "len"]
    assert all(norm > 0 for norm in found["gradients"]["run"]["factors"]["B"]["norm"])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{adapter}", "--routers"], 2, "needs the tasks' rows"),
        (
            ["{run}", "--rows-per-task=8"],
            2,
            "--rows-per-task requires --routers, --gradients or --membership",
        ),
        (["{run}", "--routers", "--rows-per-task=0"], 2, "expected at least 1"),
        (["{run}", "--seed=1"], 2, "similarity and drift read no recipe"),
        (["study", "demo", "--rows-per-task=0"], 2, "does not apply to a study"),
        (["{run}", "--tasks=up"], 2, "--tasks only applies to `braidlora analyze study"),
        (["{run}", "--routers", "--model.path=./nowhere"], 2, "no such folder './nowhere'"),
    ],
)
def test_options_that_do_not_apply_are_refused(words, code, says, runs, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs("alora") / "adapter", tmp_path / "adapter")
    places = {"adapter": tmp_path / "adapter", "run": runs("alora")}
    assert main(["analyze", *(word.format(**places) for word in words)]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

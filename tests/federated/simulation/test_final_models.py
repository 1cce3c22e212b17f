"""The clients' models after the last round: the adapters that are saved, and where their rows would pull them next."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from braidlora.analysis import analyze
from braidlora.analysis.batches import task_batches
from braidlora.cli import main
from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.final import final_models, last_round, trained_rows
from braidlora.federated.site.clients import load_clients
from braidlora.models.loading import Loaded
from braidlora.runs import FederatedDirectory
from braidlora.training.trainer import MultiTaskTrainer
from helpers.tiny_base import TASKS

RULES = {
    "fedit": {},
    "fed-alora": {"share_head": True, "kind": "classify"},
    "fedsa-lora": {"sample": {"number": 1}},  # of three, in two rounds: one never took part
    "fed-alora-het": {"ranks": [2, 4, 3]},
    "flexlora": {"ranks": [2, 4, 3]},
}


def saved(run, name):
    return load_file(run / "clients" / name / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("rule", RULES)
def test_final_models_are_the_saved_adapters(rule, make_config):
    run = federate(make_config(rule=rule, **RULES[rule]), progress=False).directory
    seen = []
    for client, host in final_models(FederatedDirectory(run)):
        seen.append(client.name)
        expected = saved(run, client.name)
        found = host.read()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (client.name, name)
    assert seen == sorted(TASKS)


def test_final_models_under_flora_carry_the_stack_that_is_saved(make_config, tiny_base):
    run = federate(make_config(rule="flora", ranks=[2, 4, 3]), progress=False).directory
    ids = torch.tensor([[5, 9, 20, 7]])
    for client, host in final_models(FederatedDirectory(run)):
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base), run / "clients" / client.name / "adapter"
        )
        torch.testing.assert_close(host.model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-5, rtol=0)


def test_rows_that_a_client_was_trained_on(make_config, monkeypatch):
    """One client in each of two rounds, with one step of four rows: the rows that reached the model."""
    config = make_config(
        rule="fedit", sample={"number": 1}, local={"steps": 1}, training__batch_size=2,
        training__gradient_accumulation=2, training__warmup_steps=0,
    )  # fmt: skip
    reached, step = [], MultiTaskTrainer.training_step

    def watched(trainer, model, inputs, *args, **kwargs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            reached.append(tuple(ids[mask.bool()].tolist()))
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "training_step", watched)
    run = FederatedDirectory(federate(config, progress=False).directory)
    experiment, last = last_round(run)
    found, rounds = set(), 0
    for client, host in final_models(run):
        seen, times = trained_rows(experiment, last, client, host)
        assert len(seen) <= 4 * times
        found |= {tuple(host.rows(client)[row]["input_ids"]) for row in seen}
        rounds += times
    assert (rounds, found) == (2, set(reached))
    [section] = analyze([run.path], membership=True)["membership"].values()
    assert section["held_in"] == len(reached)
    left_out = [note for note in section["notes"] if note.endswith("so it is left out")]
    assert any("0 of its" in note and "in the 0 rounds that count" in note for note in left_out), (
        "of three clients one is never sampled"
    )


def gradient(run, base, config, client, factor):
    """Both halves' gradients by plain PEFT, row by row, over the rows that the measurement takes: (2, numbers)."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base),
        run / "clients" / client.name / "adapter",
        is_trainable=True,
    ).eval()
    wanted = [p for name, p in model.named_parameters() if f"_{factor}." in name]
    for parameter in wanted:
        parameter.requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded = Loaded(model, tokenizer, config, client.tasks, None)
    sums = [[torch.zeros_like(p) for p in wanted] for _ in range(2)]
    targets = 0
    for task in task_batches(loaded, 6, ("train",)):
        for half, batches in enumerate(task.halves):
            for batch in batches:
                for ids, mask, labels in zip(
                    batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
                ):
                    ids, labels = ids[mask.bool()][None], labels[mask.bool()][None]
                    count = int((labels[:, 1:] != -100).sum())
                    targets += count
                    loss = model(input_ids=ids, labels=labels).loss * count
                    for total, grad in zip(sums[half], torch.autograd.grad(loss, wanted), strict=True):
                        total += grad
    return torch.stack([torch.cat([part.flatten() for part in half]) for half in sums]) / targets


@pytest.mark.parametrize(
    ("rule", "options", "shared", "factors"),
    [
        ("fed-alora", {}, ["B"], "AB"),
        ("fedsa-lora", {}, ["A"], "AB"),
        # two tasks on one client, and factors of different shapes, which are left out
        ("fed-alora-het", {"clients": [{"name": "one", "tasks": ["up", "len"], "rank": 2},
                                       {"name": "two", "tasks": ["rev"], "rank": 4}]}, ["base"], ["base"]),
    ],
)  # fmt: skip
def test_gradients_of_clients_are_those_of_plain_peft(rule, options, shared, factors, make_config, tiny_base):
    config = make_config(rule=rule, **options)
    run = federate(config, progress=False).directory
    found = analyze([run], gradients=True, rows=6)
    section = found["gradients"][run.name]
    clients = load_clients(config).by_name
    assert section["of"] == "client"
    assert section["tasks"] == sorted(clients)
    assert section["shared"] == shared
    assert [entry["label"] for entry in found["adapters"]] == sorted(clients)
    assert list(section["factors"]) == list(factors)
    for factor in factors:
        halves = [gradient(run, tiny_base, config, client, factor) for client in clients.values()]
        whole = [half.sum(0) for half in halves]
        entry = section["factors"][factor]
        assert entry["norm"] == pytest.approx([float(one.norm()) for one in whole], rel=1e-4)
        expected = float(F.cosine_similarity(whole[0].double(), whole[1].double(), dim=0))
        assert entry["cosine"][0][1] == pytest.approx(expected, abs=2e-4)
        within = float(F.cosine_similarity(halves[0][0].double(), halves[0][1].double(), dim=0))
        assert entry["cosine"][0][0] == pytest.approx(within, abs=2e-4)


def test_a_federation_from_the_command_line(make_config, tmp_path, monkeypatch, capsys):
    run = federate(make_config(rule="fed-alora"), progress=False).directory
    assert (
        main(["analyze", str(run), "--gradients", "--rows-per-task=4", "--output", str(tmp_path / "seen")])
        == 0
    )
    told = capsys.readouterr().out
    assert "cosine between clients" in told
    written = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    assert written["similarity"]["A"]["elements"] == sorted(TASKS)
    assert any(
        figure["title"] == "Do the clients pull run in the same direction?" for figure in written["figures"]
    )
    # routers alone have nothing to look at
    assert main(["analyze", str(run), "--routers", "--output", str(tmp_path / "seen")]) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "flora"}, "under flora clients start a new A and B"),
        (
            {"rule": "zero-padding", "ranks": [2, 4, 3]},
            "clients of ranks 2, 3, 4 have factors of different shapes",
        ),
        (
            {"rule": "fed-alora", "clients": [{"name": "one", "tasks": ["up", "rev", "len"]}]},
            "has one client; conflict needs two",
        ),
    ],
)
def test_gradients_that_mean_nothing_are_refused(options, says, make_config):
    run = federate(make_config(rounds=1, **options), progress=False).directory
    with pytest.raises(ConfigError, match=says):
        analyze([run], gradients=True, rows=2)


def test_clients_of_two_federations_are_told_apart(make_config):
    runs = [
        federate(make_config(rule, rule=rule, rounds=1), progress=False).directory
        for rule in ("fed-alora", "fedsa-lora")
    ]
    found = analyze(runs, gradients=True, rows=2)
    assert [entry["label"] for entry in found["adapters"]] == [
        f"{rule}/{name}" for rule in ("fed-alora", "fedsa-lora") for name in sorted(TASKS)
    ]
    assert {label: section["shared"] for label, section in found["gradients"].items()} == {
        "fed-alora": ["B"],
        "fedsa-lora": ["A"],
    }


def test_settings_of_the_federation_are_not_overridden(make_config):
    run = federate(make_config(rule="fed-alora", rounds=1), progress=False).directory
    with pytest.raises(
        ConfigError, match=r"--federation\.rule: the federation was run with its own settings"
    ):
        analyze([run], gradients=True, rows=2, overrides=["--federation.rule=fedit"])


def test_a_federation_is_found_by_a_path_with_dots_and_has_to_be_finished(make_config, tmp_path, monkeypatch):
    run = federate(make_config(rule="fed-alora", rounds=1), progress=False).directory
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = analyze(["../run"])
    assert [entry["label"] for entry in found["adapters"]] == sorted(TASKS)
    (run / "metrics.json").unlink()  # as while it goes on for more rounds
    with pytest.raises(CheckpointError, match="not finished; its clients' adapters are missing or outdated"):
        analyze(["../run"])


def test_a_client_with_one_row_is_left_out_by_name(make_config, rows, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text((rows / "up.jsonl").read_text().splitlines()[0] + "\n")
    config = make_config(rule="fed-alora", rounds=1)
    tasks = [task.model_dump(mode="json", exclude_unset=True) for task in config.tasks]
    tasks.append({**tasks[0], "name": "tiny", "train": str(one), "test": str(one)})
    run = federate(make_config(rule="fed-alora", rounds=1, tasks=tasks), progress=False).directory
    with pytest.warns(UserWarning, match="these clients are excluded: tiny"):
        found = analyze([run], gradients=True, routers=False, rows=4)
    assert found["gradients"]["run"]["tasks"] == sorted(TASKS)


def test_what_is_no_longer_that_of_the_federation_is_refused(make_config, rows, tmp_path):
    config = make_config(rule="fed-alora", rounds=1)
    run = federate(config, progress=False).directory
    directory = FederatedDirectory(run)
    with pytest.raises(DataError, match="rows are no longer those of"):
        next(final_models(directory, ["split.test=0.3"]))
    (run / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match="not a finished federation"):
        next(final_models(directory))

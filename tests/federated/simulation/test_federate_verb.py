"""`braidlora federate` as its users meet it: tables, JSON, references, sampling, heads, workers, clients that join."""

import json

import pytest
import torch
import yaml
from client_states import state_path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from braidlora.cli import main
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.table import format_federation
from braidlora.runs import cover
from helpers.recipes import federated_recipe
from helpers.tiny_base import TASKS

# Tiny tasks and cutoffs; test_checks.py tests what is said of them.
pytestmark = pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")


@pytest.fixture
def write_recipe(tiny_base, rows, tmp_path):
    def write(output="run", **overrides):
        path = tmp_path / f"{output}.yaml"
        path.write_text(
            yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / output, **overrides)),
            encoding="utf-8",
        )
        return str(path)

    return write


def verb(capsys, *words):
    """Exit code, what went to stdout, what went to stderr."""
    words = list(words)
    if words[0] == "federate" and words[1].endswith(".yaml") and "--output" not in " ".join(words):
        words.insert(2, f"--output={words[1].removesuffix('.yaml')}")  # exactly there, and not next to it
    code = main(words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def test_the_table_names_every_client_and_what_travelled(write_recipe, tmp_path, capsys):
    code, out, err = verb(capsys, "federate", write_recipe())
    assert code == 0, err
    for words in (
        *TASKS,
        "before",
        "after",
        "aggregated",
        "mean of 3",
        "rule fed-alora, 2 rounds",
        "sent up",
    ):
        assert words in out
    assert "round 2/2" in err, "the bar"
    assert (tmp_path / "run" / "report.html").is_file()
    code, _, err = verb(capsys, "federate", write_recipe(), "--json")
    assert code == 5
    assert "already has a finished federation" in err
    code, out, err = verb(capsys, "federate", write_recipe(), "--json", "--resume", "auto")
    assert (code, err) == (0, "")
    assert json.loads(out)["rounds"] == 2


def test_what_cannot_be_is_refused_before_anything_is_written(write_recipe, tmp_path, capsys):
    for words, code, said in (
        (["--resume", "round-1"], 2, "expected `auto`"),
        (["--federation.rule=fedsa"], 2, "federation.rule: got 'fedsa'"),
        (["--federation.ranks=[2, 4, 3]"], 2, "needs one rank for all clients"),
        (["--adapter.target_modules=[q_prj]"], 2, "Nearest: q_proj"),
        (["--tasks.up.train=missing.jsonl"], 3, "no such file"),
        ([f"--output={tmp_path}/../elsewhere"], 2, "contains `..`"),
        (["--local-run", str(tmp_path)], 5, "not a finished federation"),
    ):
        got, _, err = verb(capsys, "federate", write_recipe(), *words)
        assert (got, said in err) == (code, True), err
    assert not (tmp_path / "run").exists()


def test_a_train_run_is_not_written_over(write_recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {path: x}\n")
    for words in ([], ["--overwrite"], ["--resume", "auto"]):
        code, _, err = verb(capsys, "federate", write_recipe(), *words)
        assert code == 2
        assert "has files that were not written by a federation" in err


def test_delta_m_is_against_clients_that_train_alone(write_recipe, tmp_path, capsys):
    assert verb(capsys, "federate", write_recipe("alone", rule="local"), "--json")[0] == 0
    metrics = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    scores = {"len": 50.0, "rev": 20.0, "up": 80.0}
    for name, score in scores.items():  # so small a base scores nothing
        metrics["clients"][name]["mean"] = score
    (tmp_path / "alone" / "metrics.json").write_text(json.dumps(metrics))
    cover(tmp_path / "alone", ["metrics.json"])
    words = ["--json", "--local-run", str(tmp_path / "alone")]
    code, out, err = verb(capsys, "federate", write_recipe(), *words)
    assert code == 0, err
    together = json.loads(out)
    expected = sum((score - together["clients"][name]["mean"]) / score for name, score in scores.items()) / 3
    assert together["delta_m"] == pytest.approx(100 * expected)
    code, _, err = verb(capsys, "federate", write_recipe("other"), *words[:-1], str(tmp_path / "run"))
    assert (code, "made by rule fed-alora; expected rule local" in err) == (2, True)
    code, _, err = verb(capsys, "federate", write_recipe("other", split__seed=3), *words)
    assert (code, "has other test rows for len, rev, up" in err) == (2, True)


def test_sampled_clients_are_drawn_by_the_seed_and_catch_up(make_config, tmp_path):
    """Under flora a client that missed rounds is sent all of them, and carries what the others carry."""
    config = make_config(rule="flora", rounds=4, sample={"number": 2}, ranks=[2, 4, 3])
    federate(config, progress=False)
    asked = [
        sorted(name for name, one in line["clients"].items() if "loss" in one)
        for line in lines(tmp_path / "run")
    ]
    assert all(len(names) == 2 for names in asked)
    assert len({tuple(names) for names in asked}) > 1
    stacks = [
        load_file(tmp_path / "run" / "clients" / name / "adapter" / "adapter_model.safetensors")
        for name in TASKS
    ]
    for key in (key for key in stacks[0] if "lora_A" in key):
        products = [stack[key.replace("lora_A", "lora_B")] @ stack[key] for stack in stacks]
        assert products[0].abs().max() > 0
        for product in products[1:]:
            torch.testing.assert_close(product, products[0], atol=1e-6, rtol=0)
    federate(
        make_config("again", rule="flora", rounds=4, sample={"number": 2}, ranks=[2, 4, 3]), progress=False
    )
    assert [line["clients"].keys() for line in lines(tmp_path / "again")] == [
        line["clients"].keys() for line in lines(tmp_path / "run")
    ]


def test_heads_travel_only_when_shared_and_a_common_test_is_a_mean_over_models(make_config, tmp_path):
    for share in (True, False):
        output = f"share-{share}"
        result = federate(
            make_config(output, kind="classify", share_head=share, common_test=["up", "len"]), progress=False
        )
        shared = load_file(tmp_path / output / "rounds" / "round-2" / "shared.safetensors")
        states = [load_file(state_path(tmp_path / output, name, 2)) for name in TASKS]
        head = [name for name in states[0] if "lora" not in name]
        assert head
        assert (set(head) <= set(shared)) == share
        for name in head:
            saved = [
                load_file(tmp_path / output / "clients" / client / "adapter" / "adapter_model.safetensors")[
                    name
                ]
                for client in TASKS
            ]
            if share:
                expected = (8 * states[0][name] + 13 * states[1][name] + 19 * states[2][name]) / 40
                torch.testing.assert_close(shared[name], expected, atol=1e-6, rtol=0)
                assert all(torch.equal(one, shared[name]) for one in saved)
            else:
                assert all(torch.equal(one, state[name]) for one, state in zip(saved, states, strict=True))
        common = [result.metrics["clients"][name]["common"]["aggregated"] for name in TASKS]
        assert result.metrics["common"]["aggregated"] == pytest.approx(sum(common) / 3)
        assert result.metrics["clients"]["rev"]["common"]["tasks"].keys() == {"up", "len"}
        assert json.loads((tmp_path / output / "labels.json").read_text())["tasks"].keys() == {
            "len",
            "rev",
            "up",
        }


def test_two_workers_give_the_bytes_of_one(make_config, tmp_path):
    settings = {"rule": "fed-alora-het", "ranks": [2, 4, 3], "rounds": 2}
    federate(make_config("one", **settings), progress=False)
    federate(make_config("two", workers=2, **settings), progress=False)
    compared = 0
    for path in sorted((tmp_path / "one").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
        compared += 1
    assert compared == 11
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert {**one, "timing": 0} == {**two, "timing": 0}


@pytest.mark.parametrize(
    ("rule", "moved"),
    [
        ("fed-alora", {"lora_A"}),
        ("fed-alora-het", {"factoredlora_A", "factoredlora_M"}),
        ("fedit", {"lora_A", "lora_B"}),
    ],
)
def test_a_new_client_receives_what_is_shared_and_trains_its_own(
    write_recipe, tiny_base, rows, tmp_path, capsys, rule, moved
):
    path = write_recipe(
        rule=rule, tasks=[{"name": "up", "train": str(rows / "up.jsonl"), "max_new_tokens": 3}]
    )
    assert verb(capsys, "federate", path, "--json")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "rounds").rglob("*") if p.is_file()}
    words = ["federate", "add-client", str(tmp_path / "run"), "--name", "west", "--tasks", "up"]
    given = ["--train", str(rows / "rev.jsonl"), "--test", str(rows / "len.jsonl")]
    code, out, err = verb(capsys, *words, *given, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result["trained"]) == moved
    assert result["rows"] == 16
    assert result["tasks"]["up"]["n"] == 10
    saved = load_file(tmp_path / "run" / "clients" / "west" / "adapter" / "adapter_model.safetensors")
    shared = load_file(tmp_path / "run" / "rounds" / "round-2" / "shared.safetensors")
    for name, tensor in shared.items():
        assert torch.equal(saved[name], tensor) == (name.split(".")[-2] not in moved), name
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "clients" / "west" / "adapter")
    assert model.peft_config["default"].r == 4
    assert {p: p.read_bytes() for p in before} == before, "the federation stays as it is"
    for wrong, said in (
        (["--name", "up"], "a client of this federation has this name"),
        (["--name", "../up"], "expected letters"),
        ([], "west exists, and is not overwritten"),
        (["--tasks", "down"], "unknown; the recipe's tasks are up"),
        (["--rank", "0"], "--rank 0: expected at least 1"),
        (["--epochs", "-1"], "--epochs -1: expected a finite number above 0"),
        (["--epochs", "nan"], "--epochs nan: expected a finite number above 0"),
        (["--federation.rule=fedsa-lora"], "--federation.rule: the shared state depends on"),
        (["--seed=7"], "--seed: the shared state depends on"),
        (["--rank", "2"], "needs the rank of all clients, 4" if rule != "fed-alora-het" else ""),
    ):
        if said:
            code, _, err = verb(capsys, *words, *given, *wrong)
            assert (code, said in err) == (2, True), err


def test_a_new_client_has_the_rank_and_the_scaling_of_the_others(write_recipe, tmp_path, capsys):
    """Clients of rank 2 and scaling 1 where `adapter` has rank 4 and scaling 2: the shared A was made at scaling 1."""
    clients = [{"name": name, "tasks": [name], "rank": 2, "alpha": 2} for name in TASKS]
    path = write_recipe(rule="fedsa-lora", clients=clients, rounds=1)
    assert verb(capsys, "federate", path, "--json")[0] == 0
    words = ["federate", "add-client", str(tmp_path / "run"), "--tasks", "up", "--epochs", "1", "--json"]
    for name, given in (("west", []), ("east", ["--rank", "2"])):
        code, _, err = verb(capsys, *words, "--name", name, *given)
        assert code == 0, err
        saved = json.loads(
            (tmp_path / "run" / "clients" / name / "adapter" / "adapter_config.json").read_text()
        )
        assert (saved["r"], saved["lora_alpha"]) == (2, 2)
    code, _, err = verb(capsys, *words, "--name", "south", "--rank", "4")
    assert (code, "--rank 4: rule fedsa-lora needs the rank of all clients, 2" in err) == (2, True), err


def test_a_new_client_among_different_ranks_has_the_recipes(write_recipe, tmp_path, capsys):
    path = write_recipe(rule="zero-padding", ranks=[1, 2, 3], rounds=1)
    assert verb(capsys, "federate", path, "--json")[0] == 0
    words = [
        "federate",
        "add-client",
        str(tmp_path / "run"),
        "--tasks",
        "up",
        "--epochs",
        "1",
        "--name",
        "west",
    ]
    code, out, err = verb(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["rank"] == 4
    saved = json.loads(
        (tmp_path / "run" / "clients" / "west" / "adapter" / "adapter_config.json").read_text()
    )
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)


def test_rows_of_a_new_client_are_chosen_as_the_recipe_chooses_the_tasks(write_recipe, tmp_path, capsys):
    """One file with the rows of several tasks and splits: `where` and `limit` hold for --train and --test as well."""
    pooled = tmp_path / "pooled.jsonl"
    rows = [
        {"task": task, "instruction": task, "input": "abc"[: 1 + n % 3], "output": f"{task[0]}{n % 10}"}
        for task in ("up", "rev")
        for n in range(30)
    ]
    pooled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = tmp_path / "site.jsonl"
    site.write_text("".join(json.dumps({**row, "input": "ff"}) + "\n" for row in rows[5:50]))
    source = {"source": str(pooled), "where": {"task": "up"}, "limit": 12}
    tasks = [{"name": "up", "max_new_tokens": 3, "train": source, "test": {**source, "limit": 6}}]
    assert verb(capsys, "federate", write_recipe(tasks=tasks, split__test=0.0, rounds=1), "--json")[0] == 0
    words = ["federate", "add-client", str(tmp_path / "run"), "--tasks", "up", "--epochs", "1", "--json"]
    code, out, err = verb(capsys, *words, "--name", "west", "--train", str(site), "--test", str(site))
    assert code == 0, err
    result = json.loads(out)
    assert result["rows"] == 12, "of 25 rows of this task, as many as the recipe's limit"
    assert result["tasks"]["up"]["n"] == 6
    answers = (tmp_path / "run" / "clients" / "west" / "predictions" / "up.jsonl").read_text()
    assert [json.loads(line)["prompt"] for line in answers.splitlines()] == ["up:ff->"] * 6
    # A part that the recipe does not have takes the other part's `where`.
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["tasks"][0]["test"] = None
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    cover(tmp_path / "run", ["config.yaml"])
    code, out, err = verb(capsys, *words, "--name", "east", "--test", str(site))
    assert code == 0, err
    assert json.loads(out)["tasks"]["up"]["n"] == 25
    site.write_text(json.dumps({"instruction": "up", "input": "a", "output": "b"}) + "\n")
    code, out, err = verb(capsys, *words, "--name", "south", "--test", str(site))
    assert (code, "there is no column 'task'" in err) == (3, True), err


def test_an_override_takes_the_place_of_the_recipes_alternative(write_recipe, tmp_path, capsys):
    """No `epochs=null` is needed to train for steps; two overrides that exclude each other are still refused."""
    path = write_recipe(local={"epochs": 1}, sample={"fraction": 1.0}, rounds=1)
    words = ["--federation.local.steps=2", "--federation.sample.number=2", "--json"]
    code, _, err = verb(capsys, "federate", path, *words)
    assert code == 0, err
    [line] = lines(tmp_path / "run")
    assert [one["steps"] for one in line["clients"].values() if "loss" in one] == [2, 2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["federation"]["local"] == {
        "epochs": None, "steps": 2,
    }  # fmt: skip
    code, _, err = verb(capsys, "federate", path, *words, "--resume", "auto")
    assert code == 0, "the same recipe and overrides are the same federation"
    for both in (["--federation.local.epochs=1"], ["--federation.sample.fraction=0.5"]):
        code, _, err = verb(capsys, "federate", path, *words, *both, "--overwrite")
        assert (code, "give" in err) == (2, True), err
    path = write_recipe(local={"epochs": 1, "steps": 2})
    code, _, err = verb(capsys, "federate", path, "--overwrite")
    assert (code, "give either epochs or steps" in err) == (2, True), "a recipe that says both"


def test_preview_of_a_federated_recipe(write_recipe, rows, tmp_path, capsys):
    path = write_recipe(
        clients=[{"name": "north", "tasks": ["up", "rev"]}, {"name": "south", "tasks": ["up", "len"]}]
    )
    code, out, err = verb(capsys, "preview", path, "--rows-per-task", "1")
    assert code == 0, err
    assert "2 clients, 3 generate tasks, mixing proportional within each client" in out
    assert "north  rank 4: rev 13 train, 3 test; up 19 train, 5 test" in out
    assert "━━ up (exact_match)  24 rows: 19 train, 5 test" in out
    assert out.count("━━ up") == 1, "rows that two clients share are shown once"
    code, out, err = verb(capsys, "preview", path, "--json")
    result = json.loads(out)
    assert result["clients"]["south"] == {
        "rank": 4, "rows": {"len": {"train": 8, "test": 2}, "up": {"train": 19, "test": 5}},
    }  # fmt: skip
    assert len(result["tasks"]["up"]["examples"]) == 2
    folder = tmp_path / "sites"
    folder.mkdir()
    for name, source in (("a", "up"), ("b", "rev")):
        (folder / f"{name}.jsonl").write_text((rows / f"{source}.jsonl").read_text())
    tasks = [{"name": "words", "train": str(folder), "max_new_tokens": 3}]
    code, out, err = verb(capsys, "preview", write_recipe(tasks=tasks, partition={"by": "file"}), "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [one["rows"]["words"]["train"] for one in result["clients"].values()] == [19, 13]
    assert result["tasks"]["words"]["data"]["train"]["rows"] == 32


def test_a_client_cannot_join_where_nothing_is_shared_or_finished(write_recipe, tmp_path, capsys):
    words = ["federate", "add-client", str(tmp_path / "run"), "--name", "west", "--tasks", "up"]
    code, _, err = verb(capsys, *words)
    assert (code, "no such run" in err) == (2, True)
    (tmp_path / "run").mkdir()
    code, _, err = verb(capsys, *words)
    assert (code, "not a finished federation" in err) == (5, True)
    assert verb(capsys, "federate", write_recipe(rule="local", rounds=1), "--json")[0] == 0
    code, _, err = verb(capsys, *words)
    assert (code, "shares nothing" in err) == (2, True)


def test_the_federated_demo_sets_both_beside_each_other(tmp_path, capsys):
    rows = "{source: 'generated:NAME', limit: 4}"
    tasks = [f"{{name: {n}, train: {rows}, test: {rows}}}".replace("NAME", n) for n in ("rising", "who")]
    words = [
        f"--output={tmp_path}/demo", f"--tasks=[{', '.join(tasks)}]", "--federation.rounds=1",
        "--federation.local={steps: 1}", "--evaluation.max_new_tokens=1",
    ]  # fmt: skip
    code, out, err = verb(capsys, "demo", "--federated", *words)
    assert code == 0, err
    for said in ("alone", "together", "rising", "who", "sent up"):
        assert said in out
    report = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert report["alone"]["rule"] == "local"
    assert report["together"]["rule"] == "fed-alora"
    page = tmp_path / "demo" / "fed-alora" / "report.html"
    assert f"Report         {page}" in out
    page.unlink()
    code, _, err = verb(capsys, "demo", "--federated", "--json", "--no-report", *words)
    assert code == 0, "a finished demo is shown again"
    assert not page.exists()


@pytest.mark.slow
def test_two_hundred_clients_in_one_go(make_config, rows, tmp_path):
    tasks = [{"name": "sum", "train": {"source": "generated:sum", "limit": 1000}, "max_new_tokens": 2,
              "test": {"source": "generated:sum", "limit": 200}}]  # fmt: skip
    config = make_config(tasks=tasks, split__test=0.0, partition={"clients": 200, "min_rows": 4}, rounds=2)
    result = federate(config, progress=False)
    assert len(result.metrics["clients"]) == 200
    assert all(one["rounds"] == 2 for one in result.metrics["clients"].values())


def test_a_new_client_does_not_train_a_shared_head(write_recipe, rows, tmp_path, capsys):
    assert (
        verb(capsys, "federate", write_recipe(kind="classify", share_head=True, rounds=1), "--json")[0] == 0
    )
    words = ["federate", "add-client", str(tmp_path / "run"), "--name", "west", "--tasks", "up"]
    code, _, err = verb(capsys, *words, "--train", str(rows / "rev-labels.jsonl"), "--json")
    assert code == 0, err
    saved = load_file(tmp_path / "run" / "clients" / "west" / "adapter" / "adapter_model.safetensors")
    shared = load_file(tmp_path / "run" / "rounds" / "round-1" / "shared.safetensors")
    assert any("lora" not in name for name in shared)
    for name, tensor in shared.items():
        assert torch.equal(saved[name], tensor), name


def test_the_table_of_a_federation_whose_last_round_was_not_scored(write_recipe, tmp_path, capsys):
    """Asked to end earlier than it was begun for: only the aggregated models have scores then."""
    path = write_recipe(common_test=["up"], rounds=1)
    code, out, err = verb(capsys, "federate", path, "--json")
    assert code == 0, err
    metrics = json.loads(out)
    metrics["common"] |= {"before": None, "after": None}
    assert "(before –, after –)" in format_federation(metrics)

"""Private federations through the command line: what counts in ε, whatever is killed, repeated or rolled back."""

import json
import random

import pytest
import yaml

from braidlora.cli import _federate, main
from braidlora.federated.protocol.accountant import Release, spent
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation import rounds as rounds_module
from braidlora.federated.simulation.driver import federate
from braidlora.runs import _directory as directory_module
from helpers.recipes import federated_recipe
from helpers.tiny_base import TASKS

pytest.importorskip("dp_accounting", reason="needs dp-accounting")

SECTION = {"clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-2}


def lines(directory, name="rounds.jsonl"):
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def _pages(monkeypatch, request):
    """Pages with their figures take most of the time of so small federations; one test looks at them."""
    if "report" not in request.node.name:
        monkeypatch.setattr(_federate, "write_page", lambda directory, command: (None, "none"))


@pytest.fixture
def recipe(tiny_base, rows, tmp_path):
    """Write a private recipe: `recipe(privacy={…}, rounds=3)` → its path."""

    def write(output="run", privacy=SECTION, **options):
        path = tmp_path / f"{output}.yaml"
        given = {"weights": "uniform", "privacy": privacy, "rounds": 3, **options}
        data = federated_recipe(tiny_base, rows, tmp_path / output, **given)
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return str(path)

    return write


def run(path, *words):
    return main(["federate", path, f"--output={path.removesuffix('.yaml')}", *words])


def central(count, z=1.5, q=1.0, delta=1e-2):
    return spent([Release(0, "aggregate", z, q)] * count, delta, at_clients=False).epsilon


def test_epsilon_is_in_the_log_the_metrics_the_output_and_the_report(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(recipe(sample={"fraction": 0.6})) == 0
    shown = capsys.readouterr().out
    directory = tmp_path / "run"
    log = [line["privacy"] for line in lines(directory)]
    for number, one in enumerate(log, 1):
        assert one["guarantee"] is True
        assert one["releases"] == number
        assert one["epsilon"] == pytest.approx(central(number, q=0.6))
        assert one["epsilon_server"] is None
        assert 0 <= one["clipped"] <= len(lines(directory)[number - 1]["clients"])
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["privacy"] == {key: value for key, value in log[-1].items() if key != "clipped"}
    assert "at δ = 0.01 toward everyone but the server (add or remove one client)" in shown
    assert "the server is trusted" in shown
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "ε by round" in page
    assert "It does not cover this page" in page
    assert [one["round"] for one in lines(directory, "privacy.jsonl")] == [1, 2, 3]
    assert main(["verify", str(directory)]) == 0


def test_the_seeded_mode_reports_no_guarantee_and_resumes_to_the_same_bytes(recipe, tmp_path, capsys):
    section = {**SECTION, "seed": 7}
    for output in ("whole", "parts"):
        path = recipe(output, section, sample={"fraction": 0.6})
        if output == "parts":
            assert run(path, "--federation.rounds=1") == 0
            assert run(path, "--resume=auto") == 0
        else:
            assert run(path) == 0
    shown = capsys.readouterr().out
    assert "privacy: no guarantee: the noise comes from federation.privacy.seed" in shown
    shared = [
        (tmp_path / one / "rounds/round-3/shared.safetensors").read_bytes() for one in ("whole", "parts")
    ]
    assert shared[0] == shared[1]
    report = lines(tmp_path / "parts")[-1]["privacy"]
    assert (report["guarantee"], report["epsilon"]) == (False, None)
    assert report["epsilon_if_secret"] == pytest.approx(central(3, q=0.6))


def test_without_noise_there_is_no_guarantee(recipe, tmp_path, capsys):
    assert run(recipe(privacy={**SECTION, "noise_multiplier": 0.0}, rounds=1)) == 0
    assert "no guarantee: noise_multiplier is 0" in capsys.readouterr().out
    assert lines(tmp_path / "run")[0]["privacy"]["epsilon"] is None


class Killed(BaseException):
    """In place of SIGKILL."""


def killed_in_round(number, monkeypatch, path, where):
    """Run until `where` is reached in that round for the last time before the kill."""
    owner, name = where
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        with pytest.raises(Killed):
            run(path)


def test_a_round_that_was_killed_after_its_noise_was_drawn_counts_twice(recipe, tmp_path, monkeypatch):
    """The new shared state goes to clients for scoring before the round is committed."""
    path = recipe()
    killed_in_round(2, monkeypatch, path, (rounds_module, "write_round"))
    assert [one["round"] for one in lines(tmp_path / "run", "privacy.jsonl")] == [1, 2]
    assert run(path, "--resume=auto") == 0
    assert [one["round"] for one in lines(tmp_path / "run", "privacy.jsonl")] == [1, 2, 2, 3]
    last = lines(tmp_path / "run")[-1]["privacy"]
    assert last["releases"] == 4
    assert last["epsilon"] == pytest.approx(central(4))


def test_a_killed_first_round_counts_however_the_federation_begins_again(recipe, tmp_path, monkeypatch):
    for output, words in (("again", ["--resume=auto"]), ("anew", [])):
        path = recipe(output)
        killed_in_round(1, monkeypatch, path, (rounds_module, "write_round"))
        assert run(path, *words) == 0
        assert lines(tmp_path / output)[-1]["privacy"]["releases"] == 4


def test_a_kill_while_the_directory_is_cleared_loses_no_release(recipe, tmp_path, monkeypatch):
    path = recipe()
    killed_in_round(1, monkeypatch, path, (rounds_module, "write_round"))
    killed_in_round(1, monkeypatch, path, (directory_module, "remove_tree"))
    assert [one["round"] for one in lines(tmp_path / "run", "privacy.jsonl")] == [1]
    assert run(path) == 0
    assert lines(tmp_path / "run")[-1]["privacy"]["releases"] == 4


def test_a_round_that_was_killed_before_its_noise_was_drawn_does_not_count(recipe, tmp_path, monkeypatch):
    path = recipe()
    killed_in_round(2, monkeypatch, path, (rounds_module, "exchange"))
    assert run(path, "--resume=auto") == 0
    assert lines(tmp_path / "run")[-1]["privacy"]["releases"] == 3


def test_the_ledger_is_written_before_the_noise_is_drawn(recipe, tmp_path, monkeypatch):
    seen, close = [], Server.close

    def watched(server):
        seen.append(len(lines(tmp_path / "run", "privacy.jsonl")))
        return close(server)

    monkeypatch.setattr(Server, "close", watched)
    assert run(recipe()) == 0
    assert seen == [1, 2, 3]


def test_a_rollback_takes_nothing_back(recipe, tmp_path):
    path = recipe(keep_rounds=3)
    assert run(path) == 0
    assert run(path, "--rollback=1") == 0
    assert len(lines(tmp_path / "run", "privacy.jsonl")) == 3
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert run(path, "--resume=auto") == 0
    assert [one["round"] for one in lines(tmp_path / "run", "privacy.jsonl")] == [1, 2, 3, 2, 3]
    assert lines(tmp_path / "run")[-1]["privacy"]["epsilon"] == pytest.approx(central(5))


def test_more_rounds_add_to_what_was_spent(recipe, tmp_path):
    path = recipe()
    assert run(path) == 0
    assert run(path, "--federation.rounds=5", "--resume=auto") == 0
    assert lines(tmp_path / "run")[-1]["privacy"]["epsilon"] == pytest.approx(central(5))


def test_starting_over_warns_of_what_was_spent(recipe, tmp_path):
    path = recipe()
    assert run(path) == 0
    with pytest.warns(UserWarning, match="an earlier federation there has spent ε ="):
        assert run(path, "--overwrite") == 0
    assert lines(tmp_path / "run")[-1]["privacy"]["releases"] == 3


@pytest.mark.parametrize("how", ["gone", "short", "damaged"])
def test_a_ledger_that_is_incomplete_stops_the_federation(how, recipe, tmp_path, capsys):
    path = recipe()
    assert run(path, "--federation.rounds=2") == 0
    ledger, manifest = tmp_path / "run/privacy.jsonl", tmp_path / "run/manifest.json"
    manifest.unlink()  # as while a federation runs
    before = (tmp_path / "run/rounds.jsonl").read_bytes()
    if how == "gone":
        ledger.unlink()
    elif how == "short":
        ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    else:
        ledger.write_text(ledger.read_text() + "{\n")
    capsys.readouterr()
    assert run(path, "--resume=auto") == 5
    assert "ε is not known" in capsys.readouterr().err
    assert (tmp_path / "run/rounds.jsonl").read_bytes() == before


def test_a_budget_sets_the_noise_and_is_never_exceeded(recipe, tmp_path, monkeypatch, capsys):
    section = {"clip": 0.5, "epsilon": 4.0, "delta": 1e-2}
    path = recipe(privacy=section)
    killed_in_round(2, monkeypatch, path, (rounds_module, "write_round"))  # round 2 is released twice
    capsys.readouterr()
    assert run(path, "--resume=auto") == 6
    said = capsys.readouterr().err
    assert "round 3 is not run: ε would be" in said
    assert "1 of its releases are of rounds that were repeated" in said
    assert run(path, "--resume=auto", "--federation.rounds=2") == 0, "what it suggests"
    done = lines(tmp_path / "run")[-1]["privacy"]
    assert done["epsilon"] <= 4.0
    with pytest.warns(UserWarning, match="privacy.epsilon: 4.0 then, 9.0 now"):
        assert run(path, "--resume=auto", "--federation.privacy.epsilon=9") == 0, "and the other way"
    last = lines(tmp_path / "run")[-1]
    assert last["changes"]["settings"]["federation.privacy.epsilon"] == {"then": 4.0, "now": 9.0}
    assert last["privacy"]["noise_multiplier"] == done["noise_multiplier"], "the noise stays what it was"
    assert last["privacy"]["epsilon"] == pytest.approx(central(4, done["noise_multiplier"]))


def test_another_mechanism_is_another_federation(recipe, capsys):
    path = recipe(rounds=1)
    assert run(path) == 0
    assert run(path, "--resume=auto", "--federation.rounds=2", "--federation.privacy.clip=5") == 5
    assert "federation.privacy.clip: 0.5 then, 5.0 now" in capsys.readouterr().err


def test_rounds_without_any_client(recipe, tmp_path):
    section = {**SECTION, "seed": 1}
    assert run(recipe(privacy=section, sample={"fraction": 0.01}, rounds=2)) == 0
    for line in lines(tmp_path / "run"):
        assert line["counted"] is True
        assert not any("loss" in one for one in line["clients"].values())


def test_noise_at_the_clients_hides_all_else_from_the_server(make_config, tmp_path):
    """Losses, scores after training and row counts would tell of the rows, without noise."""
    section = {**SECTION, "noise": "clients"}
    config = make_config(rule="fed-alora", privacy=section, weights="uniform", evaluate_every=1)
    result = federate(config, progress=False)
    for line in lines(result.directory):
        for name in TASKS:
            one = line["clients"][name]
            assert (one["loss"], one["losses"], one["rows"], one["steps"]) == (None, {}, None, 0)
            assert "after" not in one
            assert one["norm"] > 5 * SECTION["clip"], "what arrives is noise above all"
        found = line["privacy"]
        assert found["neighbors"] == "replace the rows of one client"
        assert "clipped" not in found
    sent, summed = (
        [one for one in lines(result.directory, "privacy.jsonl") if one["what"] == what]
        for what in ("sent", "aggregate")
    )
    assert [one["clients"] for one in sent] == [one["clients"] for one in summed] == [sorted(TASKS)] * 2
    releases = [Release(**{**one, "clients": tuple(one["clients"])}) for one in [*sent, *summed]]
    expected = spent(releases, 1e-2, at_clients=True)
    assert found["epsilon"] == pytest.approx(expected.epsilon)
    assert found["epsilon_server"] == pytest.approx(expected.epsilon_server)
    assert found["epsilon_server"] > found["epsilon"]


def test_what_a_client_sends_with_its_own_noise_counts_although_the_round_is_lost(
    recipe, tmp_path, monkeypatch
):
    path = recipe(privacy={**SECTION, "noise": "clients"}, rounds=2)
    killed_in_round(2, monkeypatch, path, (rounds_module, "exchange"))
    assert run(path, "--resume=auto") == 0
    found = [(one["round"], one["what"]) for one in lines(tmp_path / "run", "privacy.jsonl")]
    assert found == [(1, "sent"), (1, "aggregate"), (2, "sent"), (2, "sent"), (2, "aggregate")]


def test_workers_have_the_same_noise_as_one_process(make_config, tmp_path):
    section = {**SECTION, "noise": "clients", "seed": 3}
    shared = []
    for workers in (1, 2):
        config = make_config(f"run{workers}", privacy=section, weights="uniform", rounds=1, workers=workers)
        federate(config, progress=False)
        shared.append((tmp_path / f"run{workers}/rounds/round-1/shared.safetensors").read_bytes())
    assert shared[0] == shared[1]


def test_a_conflict_is_reported_with_its_place(recipe, capsys):
    assert run(recipe(weights="rows", sample={"number": 2}, min_clients=2)) == 2
    said = capsys.readouterr().err
    for text in ("weights by rows", "sample of fixed size", "would show how many clients were drawn"):
        assert text in said
    assert "run.yaml:" in said


def test_a_federation_of_an_earlier_version_resumes(make_config, tmp_path):
    """Its recipe has no privacy, which is the default."""
    federate(make_config(rounds=1), progress=False)
    path = tmp_path / "run/experiment.json"
    record = json.loads(path.read_text())
    del record["config"]["federation"]["privacy"]
    path.write_text(json.dumps(record))
    (tmp_path / "run/manifest.json").unlink()
    federate(make_config(rounds=2), resume="auto", progress=False)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_membership_test_finds_the_leak_without_noise_and_chance_with_it(
    noisy, tiny_base, tmp_path, capsys
):
    """Random answers, which can only be memorized. Under ffa-lora all that a client trains has been averaged."""
    draw = random.Random(1)
    names = ("a", "b", "c")
    for name in names:
        rows = [
            {"instruction": "up", "input": "".join(draw.choices("abcdef", k=5)),
             "output": "".join(draw.choices("ABCDEF", k=4))}
            for _ in range(40)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    data = {
        "model": {"path": str(tiny_base)},
        "adapter": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": modules},
        "tasks": [{"name": name, "train": str(tmp_path / f"{name}.jsonl"), "max_new_tokens": 1} for name in names],
        "split": {"test": 0.5},
        "prompt": {"cutoff": 24, "template": "{instruction}:{input}->"},
        "training": {"batch_size": 20, "learning_rate": 0.02, "scheduler": "constant"},
        "federation": {
            "rule": "ffa-lora", "rounds": 8, "weights": "uniform", "evaluate_every": 0, "local": {"epochs": 20},
            "privacy": {"clip": 20.0, "noise_multiplier": 2.0 if noisy else 0.0, "delta": 1e-3, "seed": 1},
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    assert run(str(path)) == 0
    capsys.readouterr()
    words = ["analyze", str(tmp_path / "run"), "--membership", f"--output={tmp_path / 'analysis'}", "--json"]
    assert main(words) == 0
    [found] = json.loads(capsys.readouterr().out)["membership"].values()
    assert found["held_in"] == 60
    if noisy:
        assert found["loss"]["low"] < 0.5 < found["loss"]["high"]
        assert found["calibrated"]["low"] < 0.5 < found["calibrated"]["high"]
    else:
        assert found["loss"]["low"] > 0.55
        assert found["verdict"].startswith("leak")
    # One client by its folder.
    words[1] = str(tmp_path / "run/clients/a/adapter")
    assert main(words) == 0
    [one] = json.loads(capsys.readouterr().out)["membership"].values()
    assert set(one["tasks"]) == {"a"}
    assert one["loss"] == found["tasks"]["a"]["loss"]

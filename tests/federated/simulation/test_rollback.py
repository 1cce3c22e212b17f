"""Going back to an earlier round: the bytes of a federation that came no further, whatever interrupts it."""

import json
import shutil

import pytest
import yaml
from client_states import state_path

from braidlora.cli import main
from braidlora.federated.simulation import rollback
from braidlora.federated.simulation.driver import federate
from braidlora.runs import FederatedDirectory
from helpers.recipes import federated_recipe
from helpers.results import federation_bytes

SETTINGS = {
    "rule": "fed-alora",
    "keep_rounds": 4,
    "sample": {"number": 2},
    "optimizer_state": "keep",
    "rounds": 4,
}


@pytest.fixture
def command(tiny_base, rows, tmp_path, capsys):
    def call(*words, output="run", **overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / output, **overrides)),
            encoding="utf-8",
        )
        code = main(["federate", str(path), f"--output={tmp_path / output}", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def rounds_in(directory):
    return sorted(path.name for path in (directory / "rounds").iterdir())


def test_back_to_a_round_and_on_with_the_same_bytes(command, make_config, tmp_path, capsys):
    federate(make_config(**SETTINGS), progress=False)
    whole = federation_bytes(tmp_path / "run")
    assert rounds_in(tmp_path / "run") == ["round-1", "round-2", "round-3", "round-4"]
    code, out, err = command("--rollback", "2", **SETTINGS)
    assert (code, err) == (0, "")
    assert "rolled back to round 2; removed rounds 3, 4" in out
    assert rounds_in(tmp_path / "run") == ["round-1", "round-2"]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in (tmp_path / "run").glob("clients/*/*")} == {"state"}
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    assert command("--resume", "auto", "--json", **SETTINGS)[0] == 0
    assert federation_bytes(tmp_path / "run") == whole
    # The directory itself in the recipe's place, and both steps in one.
    assert main(["federate", str(tmp_path / "run"), "--rollback", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [4, 3, 2]
    assert command("--rollback", "1", "--resume", "auto", "--json", **SETTINGS)[0] == 0
    assert federation_bytes(tmp_path / "run") == whole
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("--resume auto") == 1, "the command that the page calls the same one resumes"
    assert "--rollback" not in page


def test_what_cannot_be_gone_back_to_changes_nothing(command, make_config, tmp_path):
    federate(make_config(rounds=3), progress=False)
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for words, code, said in (
        (["--rollback", "1"], 5, "has no such round; there are 2, 3"),
        (["--rollback", "4"], 5, "has no such round"),
        (["--rollback", "2", "--overwrite"], 2, "mutually exclusive"),
        (["--rollback", "2", "--resume", "auto", "--seed=9"], 5, "seed: 1 then, 9 now"),
    ):
        got, _, err = command(*words, rounds=3)
        assert (got, said in err) == (code, True), err
    state = state_path(tmp_path / "run", "up", 2)
    state.write_bytes(b"x" * len(state.read_bytes()))
    code, _, err = command("--rollback", "2", rounds=3)
    assert (code, "does not match the manifest" in err) == (5, True), err
    state.write_bytes(kept[state])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept
    code, _, err = command("--rollback", "1", output="elsewhere")
    assert (code, "is not a federation's directory" in err) == (2, True), err


def test_the_way_on_from_a_damaged_round_that_the_message_names(command, make_config, tmp_path):
    federate(make_config("whole", rounds=3), progress=False)
    federate(make_config("run"), progress=False)
    state = state_path(tmp_path / "run", "up", 2)
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = command("--resume", "auto", rounds=3)
    assert code == 5
    assert "Round 1 is intact: `braidlora federate RECIPE --rollback 1 --resume auto`" in err
    assert command("--rollback", "1", "--resume", "auto", "--json", rounds=3)[0] == 0
    assert federation_bytes(tmp_path / "run") == federation_bytes(tmp_path / "whole")


def test_a_round_that_was_deleted_is_missed(command, make_config, tmp_path):
    federate(make_config("whole", rounds=3), progress=False)
    federate(make_config("run"), progress=False)
    shutil.rmtree(tmp_path / "run" / "rounds" / "round-2")
    with pytest.warns(
        UserWarning, match=r"round-2 is missing, although .*jsonl has 2 rounds; resuming after round 1"
    ):
        assert command("--resume", "auto", "--json", rounds=3)[0] == 0
    assert federation_bytes(tmp_path / "run") == federation_bytes(tmp_path / "whole")
    for path in ("rounds", "metrics.json"):
        target = tmp_path / "run" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    code, _, err = command("--resume", "auto", rounds=3)
    assert (code, "whose rounds are missing" in err) == (5, True), err


@pytest.mark.parametrize("kill_at", [1, 4, 7])
def test_a_killed_rollback_is_ended_by_the_same_command(make_config, in_child, tmp_path, finished, kill_at):
    whole, source = finished
    shutil.copytree(source, tmp_path / "run")
    config = make_config(**SETTINGS)
    outcome = in_child(config, resume="auto", rollback=2, kill_at=kill_at)
    assert outcome.code == -9, outcome.output
    outcome = in_child(config, resume="auto", rollback=2)
    assert outcome.code == 0, outcome.output
    assert federation_bytes(tmp_path / "run") == whole


def test_a_rollback_killed_before_the_clients_states_is_ended_by_the_same_command(
    finished, tmp_path, monkeypatch
):
    run = shutil.copytree(finished[1], tmp_path / "run")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rollback, "roll_back_clients", killed)
        with pytest.raises(KeyboardInterrupt):
            rollback.rollback(FederatedDirectory(run), 2)
    assert rounds_in(run) == ["round-1", "round-2"]
    assert rollback.rollback(FederatedDirectory(run), 2) == []
    assert {path.name for path in run.glob("clients/*/*")} == {"state"}
    kept = {int(path.name.rpartition("-")[2]) for path in run.glob("clients/*/state/*")}
    assert max(kept) == 2


@pytest.fixture(scope="module")
def finished(tiny_base, rows, tmp_path_factory):
    from helpers.recipes import federated_config

    folder = tmp_path_factory.mktemp("finished") / "run"
    federate(federated_config(tiny_base, rows, folder, **SETTINGS), progress=False)
    return federation_bytes(folder), folder


def test_a_kill_before_old_rounds_are_removed_leaves_none_for_good(make_config, tmp_path):
    """As a kill right after the last rename leaves it: the rounds that were to go are still there."""
    federate(make_config(rounds=3, keep_rounds=3), progress=False)
    (tmp_path / "run" / "rounds" / ".round-9.partial").mkdir()
    federate(make_config(rounds=3), resume="auto", progress=False)
    assert rounds_in(tmp_path / "run") == ["round-2", "round-3"]

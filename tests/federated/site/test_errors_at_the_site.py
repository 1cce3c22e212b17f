"""What a client's error says stays with the client: a class and a code travel, and clients that fail are named."""

import json

import pytest
import yaml

from braidlora.cli import main
from braidlora.errors import DataError, TrainingError
from braidlora.federated.protocol.failure import failure_of
from braidlora.federated.simulation import runner
from braidlora.federated.site import local_training
from braidlora.federated.site.scores import Scorer
from helpers.recipes import federated_recipe

MARKER = "Mrs Miller, born 1954"


@pytest.fixture
def run(tiny_base, rows, tmp_path, capfd):
    def call(*words, **overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / "run", **overrides)), encoding="utf-8"
        )
        code = main(["federate", str(path), f"--output={tmp_path / 'run'}", *words])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


def everything_but_the_site(directory):
    """Text of every file that is not a client's own."""
    return "".join(
        path.read_bytes().decode("utf-8", errors="replace")
        for path in directory.rglob("*")
        if path.is_file() and "clients" not in path.relative_to(directory).parts[:1]
    )


def test_a_row_in_an_exceptions_text_stays_at_the_site(run, tmp_path, monkeypatch):
    """In training, on every path that the text could take: log, metrics, report, terminal, table, JSON."""
    train = local_training.ClientTrainer.train

    def failing(self, *args, **kwargs):
        if len(self.train_dataset) == 13:  # rev
            raise ValueError(f"cannot encode row 7: {MARKER}") from KeyError(MARKER)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(local_training.ClientTrainer, "train", failing)
    code, out, err = run(evaluate_every=1)
    assert code == 0, err
    assert MARKER not in out + err
    assert MARKER not in everything_but_the_site(tmp_path / "run")
    log = tmp_path / "run" / "clients" / "rev" / "errors.log"
    assert log.read_text().count(f"ValueError: cannot encode row 7: {MARKER}") == 2, "one a round"
    assert "round 2: ValueError [internal]" in log.read_text()
    said = (
        "client rev NEVER PARTICIPATED: failed in rounds 1, 2 and was left out; last: ValueError [internal]"
    )
    assert f"braidlora federate: warning: {said}" in err
    assert said in out
    assert said in (tmp_path / "run" / "report.html").read_text()
    code, out, err = run("--json", "--resume", "auto", evaluate_every=1)
    assert code == 0
    assert json.loads(out)["failing"]["rev"]["left_out"] == [1, 2]
    assert said in err, "also where the result is only shown again"


def test_all_failing_says_where_the_texts_are(run, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise DataError(f"rows.jsonl:3: {MARKER}")

    monkeypatch.setattr(runner, "client_step", failing)
    code, out, err = run()
    assert code == 6
    assert MARKER not in out + err
    assert "len: DataError [data]. rev: DataError [data]. up: DataError [data]." in err
    assert "clients/NAME/errors.log" in err


def test_scoring_that_fails_does_not_spread_the_text_either(run, tmp_path, monkeypatch):
    score = Scorer.score
    broken = [True]

    def failing(self, client):
        if client.name == "rev" and broken:
            raise ValueError(MARKER)
        return score(self, client)

    monkeypatch.setattr(Scorer, "score", failing)
    code, out, err = run(rounds=2, evaluate_every=0)
    assert code == 6
    assert "the final models cannot be scored: rev: ValueError [internal]" in err
    assert MARKER not in out + err
    assert MARKER not in everything_but_the_site(tmp_path / "run")
    broken.clear()
    assert run("--resume", "auto", "--json")[0] == 0


def test_a_link_in_place_of_the_log_is_not_followed(run, tmp_path, monkeypatch):
    def failing(host, client, *args, **kwargs):
        raise ValueError("x")

    (tmp_path / "elsewhere.txt").write_text("mine")
    (tmp_path / "run" / "clients" / "up").mkdir(parents=True)
    monkeypatch.setattr(runner, "client_step", failing)
    assert run()[0] == 2, "a folder that no federation wrote"
    (tmp_path / "run" / "config.yaml").write_text("federation: {}\n")
    step = runner.client_step

    def linking(host, client, *args, **kwargs):
        site = tmp_path / "run" / "clients" / client.name
        site.mkdir(parents=True, exist_ok=True)
        if not (site / "errors.log").is_symlink():
            (site / "errors.log").symlink_to(tmp_path / "elsewhere.txt")
        return step(host, client, *args, **kwargs)

    monkeypatch.setattr(runner, "client_step", linking)
    assert run()[0] == 4
    assert (tmp_path / "elsewhere.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TrainingError("step 3: the loss is nan"), "TrainingError [not-finite]"),
        (MemoryError(), "MemoryError [out-of-memory]"),
        (DataError("x"), "DataError [data]"),
        (OSError("x"), "OSError [disk]"),
        (KeyError("x"), "KeyError [internal]"),
    ],
)
def test_codes(error, said):
    assert str(failure_of(error)) == said


def test_running_out_of_memory_has_its_code():
    from braidlora.training.failures import explain_step_out_of_memory

    with pytest.raises(TrainingError) as caught, explain_step_out_of_memory():
        raise MemoryError("no more")
    assert failure_of(caught.value).code == "out-of-memory"

"""Clients that fail, updates that lie, rounds without enough clients: named, retried, left out (faults 19 to 25)."""

import json
import shutil

import pytest
import torch
from client_states import state_path, state_paths
from safetensors.torch import load_file
from spoiled import changed, lines

from braidlora.cli import main
from braidlora.config import dump_config
from braidlora.errors import CheckpointError, FederationError
from braidlora.federated.protocol.client import client_step
from braidlora.federated.protocol.rules.flora_rule import FLoRA
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation import runner
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.runner import Runner


def with_nan(tensors):
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    return tensors


def raises(result):
    raise RuntimeError("the site lost its power")


BAD = {
    "nan": (changed(tensors=with_nan), "NaN or infinite"),
    "shape": (changed(tensors=lambda t: {n: x[:1] for n, x in t.items()}), "has shape (1, 4); expected (32, 4)"),
    "dtype": (changed(tensors=lambda t: {n: x.half() for n, x in t.items()}), "has dtype float16; expected float32"),
    "foreign": (changed(tensors=lambda t: t | {"x.lora_A.weight": torch.zeros(4, 32)}), "may not be sent"),
    "missing": (changed(tensors=lambda t: dict(list(t.items())[1:])), "missing"),
    "zero": (changed(num_examples=0), "num_examples is 0"),
    "negative": (changed(num_examples=-3), "num_examples is -3"),
    "scaling": (changed(scaling=3.0), "scaling is 3; expected 2"),
    "rank": (changed(rank=5), "rank is 5; expected 4"),
    "stale": (changed(round=0), "the update is for round 0; round 1 is open"),
    "name": (changed(client="up"), "client 'name' replied in the name of 'up'"),
    "raises": (raises, "RuntimeError [internal]"),
}  # fmt: skip


def test_bad_clients_are_named_and_left_out(make_config, tmp_path, spoil):
    """The shared state is the mean of the rest, and the bad ones keep the state that they had."""
    for name, (how, _) in BAD.items():
        spoil(name, how, rounds=(1,))
    clients = [{"name": name, "tasks": ["len"]} for name in BAD] + [
        {"name": name, "tasks": [name]} for name in ("rev", "up")
    ]
    federate(make_config(rounds=1, clients=clients), progress=False)
    [line] = lines(tmp_path / "run")
    assert line["counted"]
    assert set(line["failed"]) == set(BAD)
    for name, (_, words) in BAD.items():
        failed = line["failed"][name]
        assert failed["left_out"], name
        assert len(failed["why"]) == 1, "the same training would fail again"
        assert words in failed["why"][0], failed
    kept = {name: load_file(path) for name, path in state_paths(tmp_path / "run", 1).items()}
    assert kept.keys() == {"rev", "up"}
    shared_file = tmp_path / "run" / "rounds" / "round-1" / "shared.safetensors"
    for name, shared in load_file(shared_file).items():
        expected = (13 * kept["rev"][name].double() + 19 * kept["up"][name].double()) / 32
        torch.testing.assert_close(shared.double(), expected, atol=1e-7, rtol=0)


def test_a_second_try_counts_and_changes_no_byte(make_config, tmp_path, spoil):
    federate(make_config("smooth"), progress=False)
    tries = []

    def once(result):
        tries.append(result.update.client)
        if len(tries) == 1:
            raise MemoryError("once")
        return result

    spoil("rev", once)
    federate(make_config("run"), progress=False)
    [first, _] = lines(tmp_path / "run")
    assert first["failed"] == {
        "rev": {"why": ["MemoryError [out-of-memory]"], "codes": ["out-of-memory"], "left_out": False}
    }
    for path in sorted((tmp_path / "run").rglob("*.safetensors")):
        smooth = tmp_path / "smooth" / path.relative_to(tmp_path / "run")
        assert path.read_bytes() == smooth.read_bytes()
    # What the first try was sent and sent is counted, since it travelled.
    [calm, _] = lines(tmp_path / "smooth")
    assert first["clients"]["rev"]["down"] == 2 * calm["clients"]["rev"]["down"]


@pytest.mark.parametrize("limit", [{"min_clients": 3}, {"quorum": 0.9}, {"share_cap": 0.34}])
def test_a_round_without_enough_clients_is_skipped(make_config, tmp_path, spoil, limit):
    """The shared state and all clients stay as they were, and the next round goes on from there."""
    spoil("len", raises, rounds=(2,))
    federate(make_config(rounds=3, evaluate_every=1, **limit), progress=False)
    first, second, third = lines(tmp_path / "run")
    assert [line["counted"] for line in (first, second, third)] == [True, False, True]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["skipped"] == [2]
    for name in ("rev", "up"):
        assert second["clients"][name]["aggregated"] == first["clients"][name]["aggregated"]
    server = json.loads((tmp_path / "run" / "rounds" / "round-2" / "server.json").read_text())
    assert (server["since"], server["counted"]) == (1, {"len": 1, "rev": 1, "up": 1})
    assert json.loads((tmp_path / "run" / "rounds" / "round-3" / "server.json").read_text())["since"] == 3


def test_all_clients_failed_ends_with_exit_code_6_and_resumes(
    make_config, tmp_path, spoil, capsys, monkeypatch
):
    for name in ("len", "rev", "up"):
        spoil(name, raises, rounds=(2,))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(make_config()), encoding="utf-8")
    assert main(["federate", str(recipe), f"--output={tmp_path / 'run'}", "--json"]) == 6
    said = capsys.readouterr().err
    assert "round 2: all 3 clients failed." in said
    assert "len: RuntimeError [internal]." in said
    assert "lost its power" not in said
    assert "the site lost its power" in (tmp_path / "run" / "clients" / "len" / "errors.log").read_text()
    assert "Intact: round-1" in said
    monkeypatch.setattr(runner, "client_step", client_step)
    assert main(["federate", str(recipe), f"--output={tmp_path / 'run'}", "--json", "--resume", "auto"]) == 0
    federate(make_config("whole"), progress=False)
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "whole")).read_bytes()


def drawn(directory):
    """Who was asked in each round, where that is one client."""
    return [next(iter({**line["clients"], **line.get("failed", {})})) for line in lines(directory)]


def test_the_only_client_asked_may_fail_and_the_next_round_asks_another(make_config, tmp_path, spoil):
    config = make_config("calm", rounds=6, sample={"number": 1})
    federate(config, progress=False)
    asked = drawn(tmp_path / "calm")
    broken = next(name for name in asked[1:-1] if asked.count(name) < 6)
    spoil(broken, raises, rounds=range(1, 7))
    federate(make_config("run", rounds=6, sample={"number": 1}), progress=False)
    assert [line["counted"] for line in lines(tmp_path / "run")] == [name != broken for name in asked]
    assert lines(tmp_path / "run")[asked.index(broken)]["failed"][broken]["left_out"]


def test_two_failing_one_after_the_other_end_it(make_config, tmp_path, spoil):
    federate(make_config("calm", rounds=6, sample={"number": 1}), progress=False)
    asked = drawn(tmp_path / "calm")
    second = next(at for at in range(1, 6) if asked[at] != asked[at - 1])
    for name in ("len", "rev", "up"):
        spoil(name, raises, rounds=(second, second + 1))
    with pytest.raises(FederationError, match=f"round {second + 1}: the one client that was sampled"):
        federate(make_config("run", rounds=6, sample={"number": 1}), progress=False)
    assert len(lines(tmp_path / "run")) == second


def test_no_round_ever_counting_is_a_failure(make_config, tmp_path, spoil):
    spoil("len", raises)
    with pytest.raises(FederationError, match="none of 2 rounds had the 3 clients"):
        federate(make_config(min_clients=3), progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_clients_whose_training_explodes_fail_by_name(make_config):
    """The real thing, with nothing injected: the learning rate makes losses infinite."""
    config = make_config(
        rounds=1, local={"steps": 2}, training__learning_rate=1e30, training__max_grad_norm=0.0,
        adapter__target_modules=["gate_proj", "up_proj"],
    )  # fmt: skip
    with pytest.raises(
        FederationError, match=r"len: TrainingError \[not-finite\]\. rev: TrainingError \[not-finite\]"
    ):
        federate(config, progress=False)


def test_krum_takes_no_part_in_a_round_that_is_too_small(make_config, tmp_path, spoil):
    clients = [{"name": f"{task}{i}", "tasks": [task]} for task in ("len", "rev", "up") for i in range(2)]
    spoil("len0", raises, rounds=(1,))
    spoil("len1", raises, rounds=(1,))
    config = make_config(clients=clients, robust={"aggregator": "krum", "f": 1})
    federate(config, progress=False)
    assert [line["counted"] for line in lines(tmp_path / "run")] == [False, True]


def test_robust_aggregators_bound_what_a_liar_does(make_config, tmp_path, spoil):
    """One of three sends its update times a thousand: the mean goes with it, the others hold."""
    spoil("len", changed(tensors=lambda t: {n: 1000 * x for n, x in t.items()}), rounds=(1,))
    norms = {}
    for robust in (
        {"aggregator": "mean"}, {"aggregator": "norm-clip", "max_norm": 1.0}, {"aggregator": "median"},
        {"aggregator": "trimmed-mean", "trim": 0.34},
    ):  # fmt: skip
        name = robust["aggregator"]
        unbounded = {"change_cap": None} if name == "mean" else {}
        federate(make_config(name, rounds=1, robust=robust, **unbounded), progress=False)
        shared = load_file(tmp_path / name / "rounds" / "round-1" / "shared.safetensors")
        norms[name] = sum(float(tensor.norm()) for tensor in shared.values())
    assert all(norms["mean"] > 100 * norm > 0 for name, norm in norms.items() if name != "mean"), norms


def test_a_state_of_another_experiment_or_client_is_refused(make_config, tmp_path):
    """A file that was put in place of a client's own, with a manifest that fits (faults.md 24)."""
    from braidlora.runs import commit_directory

    federate(make_config("other", seed=2), progress=False)
    federate(make_config("run"), progress=False)
    for run, client, words in (("other", "up", "of experiment"), ("run", "len", "of client 'len'")):
        config, source = make_config("run", rounds=3), state_path(tmp_path / run, client, 2)
        with commit_directory(state_path(tmp_path / "run", "up", 2).parent) as staging:
            (staging / source.name).write_bytes(source.read_bytes())
        with pytest.raises(CheckpointError, match=words):
            federate(config, resume="auto", progress=False)


def test_a_damaged_round_is_refused_and_an_incomplete_one_passed_over(make_config, tmp_path):
    federate(make_config("run"), progress=False)
    federate(make_config("whole", rounds=3), progress=False)
    state = state_path(tmp_path / "run", "up", 2)
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = "changed since it was written.*Round 1 is intact: .*--rollback 1 --resume auto"
    with pytest.raises(CheckpointError, match=said):
        federate(make_config("run", rounds=3), resume="auto", progress=False)
    state.write_bytes(content[:100])
    with pytest.warns(UserWarning, match="skipped an incomplete round, resuming after round 1"):
        federate(make_config("run", rounds=3), resume="auto", progress=False)
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_resuming_with_another_recipe_or_other_rows_is_refused(make_config, tmp_path, rows):
    federate(make_config(), progress=False)
    with pytest.raises(CheckpointError, match=r"training.learning_rate: 0.05 then, 0.01 now"):
        federate(make_config(training__learning_rate=0.01), resume="auto", progress=False)
    tasks = [
        {"name": name, "train": {"source": str(rows / f"{name}.jsonl"), "limit": 9}, "max_new_tokens": 3}
        for name in ("len", "rev", "up")
    ]
    with pytest.raises(CheckpointError, match=r"rows of up\.up\.train"):
        federate(make_config(tasks=tasks), resume="auto", progress=False)


def test_nothing_is_lost_without_overwrite(make_config, tmp_path, capsys):
    config = make_config()
    first = federate(config, progress=False)
    with pytest.raises(CheckpointError, match="has a finished federation"):
        federate(config, progress=False)
    again = federate(config, resume="auto", progress=False)
    assert again.metrics == first.metrics
    (tmp_path / "run" / "notes.txt").write_text("mine")
    federate(make_config(seed=3), overwrite=True, progress=False)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_finished_federation_without_its_rounds_is_not_started_over(make_config, tmp_path):
    """Who removes the states to free the disk, and then resumes, keeps the result."""
    federate(make_config(), progress=False)
    shutil.rmtree(tmp_path / "run" / "rounds")
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="a finished federation whose rounds are missing"):
        federate(make_config(), resume="auto", progress=False)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


def test_bytes_of_a_client_that_was_left_out_are_counted_as_its_own(make_config, tmp_path, spoil):
    spoil("rev", changed(num_examples=0), rounds=(2,))
    metrics = federate(make_config(), progress=False).metrics
    second = lines(tmp_path / "run")[1]
    assert second["failed"]["rev"]["up"] == second["clients"]["up"]["up"]
    for way in ("up", "down"):
        assert metrics["bytes"][way] == sum(one["bytes"][way] for one in metrics["clients"].values()) > 0


def test_jobs_are_made_one_at_a_time_and_answers_are_not_kept(make_config, monkeypatch):
    """Payloads of all clients, or their answers, would fill the memory; flora's history is worked out once a round."""
    waiting, most, histories = [], [], []
    payload, run, catch_up = Server.payload, Runner.run, FLoRA.catch_up

    def counted_payload(self, name, round):
        waiting.append(name)
        most.append(len(waiting))
        return payload(self, name, round)

    def counted_run(self, job):
        waiting.remove(job.client)
        reply = run(self, job)
        for scores in (reply.before, reply.scores):
            assert scores is None or not scores.records
        return reply

    def counted_catch_up(self, shared, rank, scaling=None):
        histories.append(rank)
        return catch_up(self, shared, rank, scaling)

    monkeypatch.setattr(Server, "payload", counted_payload)
    monkeypatch.setattr(Runner, "run", counted_run)
    monkeypatch.setattr(FLoRA, "catch_up", counted_catch_up)
    config = make_config(rule="flora", ranks=[2, 4, 3], sample={"number": 1}, rounds=2, evaluate_every=1)
    federate(config, progress=False)
    assert max(most) == 1
    assert len(histories) == 2, "after either round"

"""A federation over messages: the bytes of the local engine, the handshake, and sites that come, go and lie."""

import dataclasses
import json
import shutil

import pytest
import torch

from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.grid_runner import states_text, waiting_text
from braidlora.federated.flower.hello import BEGIN, HELLO, Begun
from braidlora.federated.flower.jobs import JOB
from braidlora.federated.flower.post import LATE, UNREACHABLE, Patience
from braidlora.federated.protocol.wire import pack, unpack
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.rollback import rollback
from braidlora.runs import FederatedDirectory, verify


def lines(run):
    found = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in found:
        del line["timing"]
    return found


def shared(run, round):
    return (run / "rounds" / f"round-{round}" / "shared.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [{"rule": "fed-alora", "evaluate_every": 1}, {"rule": "fed-alora-het", "ranks": [2, 4, 3]},
     {"rule": "flora", "ranks": [2, 4, 3]}],
    ids=lambda settings: settings["rule"],
)  # fmt: skip
def test_the_bytes_are_those_of_the_local_engine(federation, make_config, settings):
    made = federation(**settings)
    run = made.run()
    local = federate(make_config("local", training__threads=1, **settings), progress=False).directory
    assert shared(run, 2) == shared(local, 2)
    assert lines(run) == lines(local)
    for name in made.post.answerers:
        [ours] = (made.folder / f"site-{name}").glob("*/adapter/adapter_model.safetensors")
        assert ours.read_bytes() == (local / "clients" / name / "adapter" / ours.name).read_bytes()
    assert not list((run / "clients").glob("*")), "nothing of a client's own is at the server"
    ours, theirs = (json.loads((one / "metrics.json").read_text()) for one in (run, local))
    assert ours["clients"] == theirs["clients"]
    assert json.loads((run / "rounds" / "round-2" / "server.json").read_text())["remote"] is True


def test_labels_and_a_common_test(federation, make_config, rows, tmp_path):
    settings = {"kind": "classify", "common_test": ["up"], "evaluate_every": 1, "share_head": True}
    config = make_config("local", training__threads=1, **settings)
    tasks = [one.model_copy(update={"options": _labels(rows, one.name)}) for one in config.tasks]
    config = config.model_copy(update={"tasks": tasks})
    made = federation(config.model_copy(update={"output": str(tmp_path / "run")}))
    run = made.run()
    local = federate(config, progress=False).directory
    assert shared(run, 2) == shared(local, 2)
    assert lines(run) == lines(local)
    assert (run / "labels.json").read_bytes() == (local / "labels.json").read_bytes()


def _labels(rows, task):
    found = [json.loads(line) for line in (rows / f"{task}-labels.jsonl").read_text().splitlines()]
    return sorted({row["label"] for row in found})


def test_rows_are_not_described_beyond_their_number(federation):
    made = federation()
    run = made.run()
    partition = json.loads((run / "partition.json").read_text())
    other = json.loads(json.dumps(made.site("up")._clients.report()))["up"]["tasks"]["up"]["train"]
    own = partition["up"]["tasks"]["up"]["train"]
    assert set(own) == {"rows", "sha256"}
    assert own["rows"] == other["rows"]
    assert own["sha256"] != other["sha256"], "keyed by the site's secret"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"adapter__r": 2}, "rank: 4 at the server, 2 at the site"),
        ({"training__learning_rate": 0.1}, "training.learning_rate: 0.05 at the server, 0.1 at the site"),
        ({"rule": "fedit"}, "federation.rule: fed-alora at the server, fedit at the site"),
        ({"adapter__target_modules": ["q_proj"]}, "adapter.target_modules"),
        ({"seed": 7}, "seed: 1 at the server, 7 at the site"),
        ({"common_test": ["up"]}, "federation.common_test: [] at the server, ['up'] at the site"),
    ],
)
def test_a_site_with_another_recipe_is_refused_with_both_values(federation, make_config, settings, expected):
    made = federation()
    made.post.answerers["rev"] = made.site("rev", make_config("other", training__threads=1, **settings))
    with pytest.raises(FederationError, match="nothing was trained") as error:
        made.run()
    assert f"rev: {expected}" in str(error.value)
    assert not (made.folder / "run" / "rounds").exists()


def test_a_site_that_scores_a_task_in_another_way_is_refused(federation):
    made = federation()
    tasks = [one.model_copy(update={"max_new_tokens": 5}) for one in made.config.tasks]
    made.post.answerers["rev"] = made.site("rev", made.config.model_copy(update={"tasks": tasks}))
    with pytest.raises(
        FederationError, match=r"rev: tasks\.up\.max_new_tokens: 3 at the server, 5 at the site"
    ):
        made.run()


def test_a_site_with_other_rows_in_the_common_test_is_refused(federation, rows, tmp_path):
    made = federation(common_test=["up"])
    (tmp_path / "up.jsonl").write_text("".join((rows / "up.jsonl").open().readlines()[:10]))
    tasks = [
        one.model_copy(update={"train": one.train.model_copy(update={"source": str(tmp_path / "up.jsonl")})})
        if one.name == "up"
        else one
        for one in made.config.tasks
    ]
    made.post.answerers["rev"] = made.site("rev", made.config.model_copy(update={"tasks": tasks}))
    with pytest.raises(
        FederationError, match=r"rev: common test: 5 rows of up at len, up, 2 rows of up at the site"
    ):
        made.run()


def test_scoring_in_another_way_needs_all_sites(federation):
    made = federation(rounds=1)
    made.run()
    evaluation = made.config.evaluation.model_copy(update={"num_beams": 2, "batch_size": 4})
    made.config = made.config.model_copy(update={"evaluation": evaluation})
    with pytest.raises(FederationError) as error:
        made.run(resume="auto")
    assert str(error.value).count("evaluation.num_beams: 2 at the server, 1 at the site") == 3
    assert "evaluation.batch_size" not in str(error.value), "a matter of memory"
    made.post.answerers = {name: made.site(name) for name in made.post.answerers}
    with pytest.warns(UserWarning, match="evaluation.num_beams: 1 then, 2 now"):
        run = made.run(resume="auto")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["scored_with"]["settings"]["evaluation.num_beams"] == 2


def test_a_site_on_another_base_of_equal_shapes_is_refused(federation, make_config, tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = next(iter(weights))
    save_file(
        {**weights, name: weights[name] + 1e-3}, tmp_path / "other" / "model.safetensors", {"format": "pt"}
    )
    made = federation()
    config = make_config("x", training__threads=1, model__path=str(tmp_path / "other"))
    made.post.answerers["rev"] = made.site("rev", config)
    with pytest.raises(FederationError, match=r"rev: base model: .*sha256:.* at len, up, .*sha256:.* at rev"):
        made.run()
    # The first by name is the one that differs: the other two are right.
    made.post.answerers |= {"len": made.site("len", config), "rev": made.site("rev")}
    with pytest.raises(FederationError) as error:
        made.run()
    [line] = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert line.startswith("  len: base model: ")
    assert " at rev, up, other (sha256:" in line
    assert str(tmp_path) not in str(error.value), "folders of a site stay there"
    made.post.away = {"up"}
    with pytest.raises(FederationError, match=r"rev: .* at len, .* at rev \(neither has more sites\)"):
        made.run()


def test_two_sites_with_each_others_names(federation):
    made = federation()
    made.post.answerers |= {"rev": Renamed(made.site("up"), "up"), "up": Renamed(made.site("rev"), "rev")}
    with pytest.raises(FederationError) as error:
        made.run()
    assert "rev: client: the site replies as 'up'; its key belongs to 'rev'" in str(error.value)
    assert "Check `name` in site.yaml at rev, up, and under which name `site add`" in str(error.value)
    assert "same recipe" not in str(error.value)
    assert "seed" not in str(error.value), "the other client's"


class Renamed:
    """Answers under another name than it is asked by."""

    def __init__(self, answerer, name):
        self.answerer, self.name = answerer, name

    def answer(self, name, envelope):
        return self.answerer.answer(self.name, envelope)


def test_where_a_base_is_stays_at_its_site(federation, tiny_base):
    made = federation(rounds=1)
    seen = []
    made.post.spoil = lambda name, answer: seen.append((answer.kind, answer.header)) or answer
    run = made.run()
    bases = [header["base"]["path"] for kind, header in seen if kind == HELLO]
    assert bases == [tiny_base.name] * 3
    experiment = json.loads((run / "experiment.json").read_text())
    assert experiment["base"]["path"] == str(tiny_base), "as in the server's own recipe"


def test_sites_that_are_waited_for_are_named(federation):
    made = federation(needed=3)
    made.post.away = {"len", "up"}
    made.post.patience = Patience(deadline=5, absence=1, sites=60, poll=0.01)
    phases = []

    def phase(text, round=None):
        phases.append(text)
        made.post.away = set(sorted(made.post.away)[1:])  # one connects

    made.post.status.phase = phase
    made.run()
    assert phases[:3] == ["waiting for 2 sites: len, up", "waiting for 1 site: up", "handshake with 3 sites"]
    assert waiting_text([str(n) for n in range(14)]).endswith("11 and 2 more")


def test_rounds_of_states_in_words():
    assert states_text(2, Begun(committed=0, pending=0)) == (
        "the server counts round 2 of this client last; the site has no committed round"
    )
    assert states_text(0, Begun(committed=0, pending=3)) == (
        "the server has counted no round of this client; the site has no committed round and round 3 pending"
    )
    assert str(UNREACHABLE) == "unreachable"
    assert str(LATE) == "Deadline [late]"


def test_dtype_and_batch_size_are_a_sites_own_and_reported(federation, make_config):
    made = federation()
    config = make_config("x", training__threads=1, model__dtype="bfloat16", training__batch_size=4)
    made.post.answerers["rev"] = made.site("rev", config)
    run = made.run()
    assert lines(run)[-1]["counted"]
    assert any(
        "rev: dtype of the base is bfloat16, and float32 at len" in one for one in made.post.status.notes
    )


def test_too_few_sites(federation):
    made = federation(needed=3)
    made.post.away = {"up"}
    with pytest.raises(
        FederationError, match=r"2 of 3 sites connected within 0 s; a round needs 3. Missing: up"
    ):
        made.run()


def test_a_site_that_comes_later_takes_part_from_then_on(federation, make_config):
    made = federation(min_clients=2)
    made.post.away = {"up"}
    spoil = made.post.spoil

    def arrive(name, answer):
        if answer.kind == JOB:
            made.post.away = set()
        return answer

    made.post.spoil = arrive
    run = made.run()
    assert spoil is None
    first, second = lines(run)
    assert first["failed"]["up"]["codes"] == ["unreachable"]
    assert "loss" in second["clients"]["up"]
    assert "up: participates from now on" in made.post.status.notes
    assert set(json.loads((run / "partition.json").read_text())) == {"len", "rev"}


def test_a_late_site_is_left_out_and_its_training_dropped(federation):
    made = federation(rounds=3, min_clients=2)

    def late_in_round_2(name, answer):
        update = json.loads(answer.header.get("update") or "{}")
        if name == "up" and update.get("round") == 2:  # trained, held, and too late
            return Envelope(JOB, {"failure": {"kind": "Deadline", "code": "late"}})
        return answer

    made.post.spoil = late_in_round_2
    run = made.run()
    log = lines(run)
    assert log[1]["failed"]["up"]["codes"] == ["late"]
    assert "loss" in log[2]["clients"]["up"]
    assert sorted(path.name for path in made.state("up").iterdir()) == ["pending-3", "round-1"]


def test_gone_for_good_at_the_end(federation):
    made = federation(rounds=2, min_clients=2, evaluate_every=1)

    def leave(name, answer):
        if name == "up" and answer.kind == JOB and answer.header.get("update"):
            made.post.away = {"up"}
        return answer

    made.post.spoil = leave
    run = made.run()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["unscored"] == ["up"]
    assert metrics["clients"]["up"]["mean"] is None
    assert metrics["clients"]["rev"]["mean"] is not None


def spoiled(change):
    """Changes the tensors of an update."""

    def how(name, answer):
        if name == "up" and answer.kind == JOB and answer.header.get("update"):
            tensors = change(unpack(answer.tensors))
            return dataclasses.replace(answer, tensors=pack(tensors))
        return answer

    return how


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (lambda t: {n: x * float("nan") for n, x in t.items()}, "rejected", "NaN or infinite"),
        (lambda t: {n: x[:, :2].contiguous() for n, x in t.items()}, "rejected", "rank 2 for 4"),
        (lambda t: {n: x * 1e6 for n, x in t.items()}, "outlier", "median"),
        (lambda t: t | {n.replace("lora_B", "lora_A"): torch.zeros(4, 32) for n in t}, "rejected", "may not be sent"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "rejected", "may not be sent"),
        (lambda t: {n: x.double() for n, x in t.items()}, "rejected", "float64"),
    ],
    ids=["nan", "rank", "large", "A", "base", "dtype"],
)  # fmt: skip
def test_an_update_that_lies_is_rejected_and_the_round_goes_on(federation, change, code, why):
    made = federation(rounds=1, min_clients=2)
    made.post.spoil = spoiled(change)
    [line] = lines(made.run())
    assert line["counted"]
    assert line["failed"]["up"]["codes"] == [code]
    assert why in line["failed"]["up"]["why"][0]


@pytest.mark.parametrize(
    "header",
    [
        None,
        {},
        {"loss": float("inf")},
        {"loss": "x" * 10},
        {"losses": {"no task": 1.0}},
        {"scores": {"own": {"up": {"metric": "m", "score": 1e300, "n": 1}}, "common": {}}},
        {"update": json.dumps({"client": "rev"})},
        {"failure": {"kind": "rows: secret, and more", "code": "data"}},
        {"failure": {"kind": "E", "code": "anything"}},
        {"steps": -1},
        {"scores": {"own": {"up": {"metric": "m", "score": 1.0, "n": 1, "more": {"a": 1}}}, "common": {}}},
        {"surprise": 1},
    ],
)
def test_an_answer_that_is_none_is_named_and_the_round_goes_on(federation, header):
    made = federation(rounds=1, min_clients=2)

    def garble(name, answer):
        if name == "up" and answer.kind == JOB and answer.header.get("update"):
            return Envelope(JOB, header if header in ({}, None) else {**answer.header, **header}, b"junk")
        return answer

    made.post.spoil = garble
    if header is None:
        made.post.spoil = lambda name, answer: (
            Envelope(JOB, {"failure": 3}) if name == "up" and answer.kind == JOB else answer
        )
    [line] = lines(made.run())
    assert line["counted"]
    assert line["failed"]["up"]["codes"][0] in ("invalid", "rejected")
    assert "secret" not in json.dumps(line)


def test_a_stale_reply_and_one_in_anothers_name(federation):
    made = federation(rounds=2, min_clients=1, evaluate_every=1)
    kept = {}

    def replay(name, answer):
        if answer.kind != JOB or not answer.header.get("update"):
            return answer
        round = json.loads(answer.header["update"])["round"]
        kept[name, round] = answer
        if name == "len" and round == 1:  # asked after `up` and `rev`, whose answers it could copy
            return kept["up", 1]
        if name == "up" and round == 2:
            return kept["up", 1]
        return answer

    made.post.spoil = replay
    first, second = lines(made.run())
    assert "in the name of 'up'" in first["failed"]["len"]["why"][0]
    assert "the update is for round 1; round 2 is open" in second["failed"]["up"]["why"][0]


def test_errors_travel_as_class_and_code_alone(federation, monkeypatch):
    made = federation(rounds=1, min_clients=2)
    answerer = made.post.answerers["up"]

    def fails(job):
        raise ValueError("row 3: the patient's name")

    monkeypatch.setattr(answerer.runner(), "run", fails)
    run = made.run()
    [line] = lines(run)
    assert line["failed"]["up"]["why"] == ["ValueError [internal]"]
    assert "patient" not in "".join(path.read_text() for path in run.rglob("*.json*"))
    [log] = (made.folder / "site-up").glob("*/errors.log")
    assert "the patient's name" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_resume_gives_the_bytes_of_an_uninterrupted_federation(federation):
    made = federation(rounds=4, rule="fed-alora", optimizer_state="restart")
    whole = made.run()
    expected = shared(whole, 4)
    other = federation(rounds=2)
    other.folder = made.folder / "again"
    other.config = made.config.model_copy(update={"output": str(other.folder / "run")})
    two = other.config.model_copy(
        update={"federation": made.config.federation.model_copy(update={"rounds": 2})}
    )
    other.post.answerers = {name: other.site(name) for name in other.post.answerers}
    other.run(two)
    other.post.answerers = {name: other.site(name) for name in other.post.answerers}  # all were restarted
    assert shared(other.run(resume="auto"), 4) == expected


def test_a_lost_state_is_refused_with_both_rounds_and_may_be_given_up(federation):
    made = federation(rounds=2, min_clients=2)
    made.run()
    more = made.config.model_copy(
        update={"federation": made.config.federation.model_copy(update={"rounds": 3})}
    )
    shutil.rmtree(made.state("up"))
    with pytest.raises(
        FederationError, match=r"up: .*CheckpointError|up: the server counts round 2"
    ) as error:
        made.run(more, resume="auto")
    assert "--accept-fresh-state up" in str(error.value)
    run = made.run(more, resume="auto", accept_fresh=["up"])
    line = lines(run)[-1]
    assert line["round"] == 3
    assert "loss" in line["clients"]["up"]


def test_an_older_copy_of_a_state_is_set_aside_only_with_the_sites_consent(federation, tmp_path):
    made = federation(rounds=2, min_clients=2)
    made.run()
    state = made.state("up")
    more = made.config.model_copy(
        update={"federation": made.config.federation.model_copy(update={"rounds": 3})}
    )
    for folder in state.iterdir():  # as from a backup after round 1
        if folder.name.endswith("-2"):
            shutil.rmtree(folder)
    with pytest.raises(
        FederationError, match=r"up: the server counts round 2 .* the site has round 1 committed"
    ):
        made.run(more, resume="auto")
    with pytest.raises(FederationError, match=r"CheckpointError \[state\]"):
        made.run(more, resume="auto", accept_fresh=["up"])
    assert "start the site with --accept-fresh-state" in next(state.parent.glob("errors.log")).read_text()
    made.post.answerers["up"] = made.site("up", accept_fresh=True)
    assert "loss" in lines(made.run(more, resume="auto", accept_fresh=["up"]))[-1]["clients"]["up"]
    assert (state.parent / "state.set-aside-1" / "round-1").is_dir()


def test_sites_follow_a_rollback_that_the_server_was_told_to_make(federation):
    made = federation(rounds=3)
    expected = shared(made.run(), 3)
    again = made.run(resume="auto", rollback=2)
    assert shared(again, 3) == expected
    assert any("went back to round 2" in note for note in made.post.status.notes)


def test_a_rollback_and_a_later_resume_are_followed_too(federation):
    """Also by a site that is away in the run after the rollback: the run directory remembers it."""
    made = federation(rounds=4, min_clients=2, keep_rounds=4)
    run = made.run()
    expected = shared(run, 4)
    assert rollback(FederatedDirectory(run), 1) == [4, 3, 2]
    assert shared(made.run(resume="auto"), 4) == expected
    assert sum("went back to round 1, as the server did" in note for note in made.post.status.notes) == 3
    assert not (run / "rolled_back.json").exists()
    rollback(FederatedDirectory(run), 1)
    made.post.away = {"up"}
    made.run(resume="auto")
    assert json.loads((run / "rolled_back.json").read_text()) == {"round": 1, "clients": ["up"]}
    assert verify(run)["not_covered"] == []
    made.post.away = set()
    more = made.config.model_copy(
        update={"federation": made.config.federation.model_copy(update={"rounds": 5})}
    )
    assert "loss" in lines(made.run(more, resume="auto"))[-1]["clients"]["up"]
    assert not (run / "rolled_back.json").exists()


def test_sites_do_not_follow_a_server_that_lost_rounds_until_it_says_so(federation):
    made = federation(rounds=3, keep_rounds=3)
    run = made.run()
    expected = shared(run, 3)
    for number in (2, 3):  # as from a backup after round 1
        shutil.rmtree(run / "rounds" / f"round-{number}")
    with pytest.warns(UserWarning, match="round-3 is missing"), pytest.raises(FederationError) as error:
        made.run(resume="auto")
    assert "up: the server counts round 1 of this client last; the site has round 2 committed" in str(
        error.value
    )
    assert "start with --rollback ROUND --resume auto" in str(error.value)
    assert (made.state("up") / "round-2").is_dir()
    assert shared(made.run(resume="auto", rollback=1), 3) == expected


def test_a_rollback_deletes_no_state_that_the_site_must_agree_to_set_aside(federation):
    made = federation(rounds=3, keep_rounds=3)
    made.run()
    with pytest.raises(FederationError, match=r"up: CheckpointError \[state\]"):
        made.run(resume="auto", rollback=1, accept_fresh=["up"])
    assert (made.state("up") / "round-2").is_dir()


def test_a_new_federation_by_the_same_recipe_has_folders_of_its_own(federation):
    made = federation(rounds=1)
    first = shared(made.run(), 1)
    again = made.run(made.config.model_copy(update={"output": str(made.folder / "again")}))
    assert shared(again, 1) == first
    assert len(list((made.folder / "site-up").glob("*/state"))) == 2


def test_what_a_server_may_not_ask(federation):
    made = federation(rounds=1)
    answerer = made.post.answerers["up"]
    for header in (
        {"experiment": "../../etc", "counted": 0},
        {"experiment": "0" * 16},
        {"experiment": 3, "counted": 1},
    ):
        answer = answerer.answer("up", Envelope(BEGIN, header))
        assert answer.header["failure"]["code"] == "internal"
    assert answerer.answer("up", Envelope("shell", {})).header["failure"]["kind"] == "FederationError"
    assert (
        answerer.answer("up", Envelope(JOB, {"payload": "{}"})).header["failure"]["kind"] == "FederationError"
    )
    assert answerer.answer("up", Envelope(HELLO, {})).header["failure"]["kind"] == "KeyError"
    assert not (made.folder / "etc").exists()


def test_a_damaged_state_at_the_handshake(federation):
    made = federation(rounds=2)
    made.run()
    [path] = made.state("up").glob("*-2/state.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    more = made.config.model_copy(
        update={"federation": made.config.federation.model_copy(update={"rounds": 3})}
    )
    with pytest.raises(FederationError, match=r"up: CheckpointError \[state\]"):
        made.run(more, resume="auto")

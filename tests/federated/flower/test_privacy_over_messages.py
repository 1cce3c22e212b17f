"""Privacy with sites behind messages: the noise of the protocol, and nothing else that a site would tell."""

import json

import pytest

from braidlora.errors import FederationError
from braidlora.federated.flower.jobs import JOB
from braidlora.federated.simulation.driver import federate

pytest.importorskip("dp_accounting", reason="needs dp-accounting")

SECTION = {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-2, "seed": 5}
SETTINGS = {"rule": "fed-alora", "weights": "uniform", "evaluate_every": 1}


def lines(run, name="rounds.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_the_bytes_and_the_ledger_are_those_of_the_local_engine(noise, federation, make_config):
    settings = {**SETTINGS, "privacy": {**SECTION, "noise": noise}, "sample": {"fraction": 0.7}}
    run = federation(**settings).run()
    local = federate(make_config("local", training__threads=1, **settings), progress=False).directory
    shared = "rounds/round-2/shared.safetensors"
    assert (run / shared).read_bytes() == (local / shared).read_bytes()
    assert (run / "privacy.jsonl").read_bytes() == (local / "privacy.jsonl").read_bytes()
    assert [one["privacy"] for one in lines(run)] == [one["privacy"] for one in lines(local)]


def test_with_its_own_noise_a_site_sends_no_loss_score_or_number_of_rows(federation):
    answers = []

    def watch(name, envelope):
        if envelope.kind == JOB and envelope.header.get("update"):
            answers.append(envelope)
        return envelope

    made = federation(**SETTINGS, privacy={**SECTION, "noise": "clients"})
    made.post.spoil = watch
    made.run()
    assert len(answers) == 6, "three sites in two rounds"
    for envelope in answers:
        update = json.loads(envelope.header["update"])
        assert (update["num_examples"], update["steps"]) == (1, 0)
        told = {key: value for key, value in envelope.header.items() if key not in ("update", "seconds")}
        assert told == {
            "failure": None, "loss": None, "losses": {}, "steps": 0, "before": None, "scores": None,
        }  # fmt: skip


def test_an_update_that_comes_too_late_has_been_seen_by_the_server(federation):
    made = federation(**SETTINGS, privacy={**SECTION, "noise": "clients"})
    made.post.late = {"up"}
    run = made.run()
    sent, summed = (
        {one["round"]: one["clients"] for one in lines(run, "privacy.jsonl") if one["what"] == what}
        for what in ("sent", "aggregate")
    )
    assert sent[1] == ["len", "rev", "up"]
    assert summed[1] == ["len", "rev"]


def test_a_site_with_another_mechanism_is_rejected(federation, make_config):
    """It would add less noise than the server counts, or more."""
    made = federation(**SETTINGS, privacy={**SECTION, "noise": "clients"})
    other = make_config(training__threads=1, **SETTINGS, privacy={**SECTION, "noise": "server"})
    made.post.answerers["rev"] = made.site("rev", other)
    with pytest.raises(FederationError, match=r"rev: federation\.privacy\.noise"):
        made.run()

"""The learning rate from round to round against its formulas, and the clients that are scored in a round."""

import json
import math
import warnings

import pytest
import yaml

from braidlora.cli import main
from braidlora.config import EvaluateSampleSection
from braidlora.federated.protocol.schedule import learning_rate
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.local_training import ClientTrainer
from braidlora.federated.site.scores import MOST_SCORED, scored_clients
from helpers.recipes import federated_config, federated_recipe
from helpers.results import federation_bytes

RATES = {
    "constant": ({}, [1.0] * 6),
    "linear": ({"floor": 0.1}, [1.0, 0.85, 0.7, 0.55, 0.4, 0.25]),
    "cosine": ({}, [(1 + math.cos(math.pi * done / 6)) / 2 for done in range(6)]),
    "exponential": ({"factor": 0.5}, [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
    "step": ({"factor": 0.1, "every": 2}, [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]),
}


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("decay", RATES)
def test_the_rate_of_every_round_is_that_of_the_formula(make_config, decay):
    settings, multipliers = RATES[decay]
    config = make_config(rounds=6, lr_schedule={"decay": decay, **settings})
    rates = [learning_rate(config, round) for round in range(1, 7)]
    assert rates == pytest.approx([0.05 * one for one in multipliers], rel=1e-12)
    assert all(rate > 0 for rate in rates), "the last round trains, too"


def test_clients_train_at_the_rate_of_the_round_with_a_new_optimizer(make_config, tmp_path, monkeypatch):
    seen, create = [], ClientTrainer.create_optimizer

    def creating(self, model=None):
        optimizer = create(self, model)
        seen.append((self.args.learning_rate, dict(optimizer.state)))
        return optimizer

    monkeypatch.setattr(ClientTrainer, "create_optimizer", creating)
    settings = {"lr_schedule": {"decay": "step", "factor": 0.1, "every": 1}, "rounds": 3}
    federate(make_config(**settings), progress=False)
    assert [rate for rate, _ in seen] == pytest.approx([0.05] * 3 + [0.005] * 3 + [0.0005] * 3)
    assert not any(state for _, state in seen), "nothing of the round before"
    assert [line["learning_rate"] for line in lines(tmp_path / "run")] == pytest.approx([0.05, 0.005, 0.0005])


@pytest.mark.parametrize(("rule", "said"), [("rolora", []), ("ffa-lora", ["rate_multipliers.A"])])
def test_a_multiplier_is_ignored_only_if_no_round_trains_its_factor(make_config, rule, said):
    """rolora trains B in the first round and A in the second; ffa-lora never trains A."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = federate(
            make_config(rule=rule, training__rate_multipliers={"A": 2.0, "B": 4.0}), progress=False
        )
    assert all("failed" not in line for line in lines(result.directory))
    texts = {str(one.message) for one in found if "rate_multipliers" in str(one.message)}
    assert texts == {f"training.{key} is ignored: no A is trained" for key in said}


def test_a_schedule_over_rounds_resumes_with_the_same_bytes(make_config, in_child, tmp_path):
    settings = {"lr_schedule": {"decay": "cosine"}, "rounds": 3}
    whole = make_config("whole", **settings)
    federate(whole, progress=False)
    outcome = in_child(make_config(**settings), kill_at=60)
    assert outcome.code == -9, outcome.output
    federate(make_config(**settings), resume="auto", progress=False)
    assert federation_bytes(tmp_path / "run") == federation_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_schedule": {"decay": "step", "factor": 0.5}}, "lr_schedule.every: `decay: step` needs it"),
        ({"lr_schedule": {"floor": 0.5}}, "lr_schedule.floor: has no effect with `decay: constant`"),
        ({"lr_schedule": {"decay": "cosine", "factor": 0.5}}, "lr_schedule.factor: has no effect"),
        (
            {"lr_schedule": {"decay": "cosine"}, "optimizer_state": "keep"},
            "the learning rate would decay twice",
        ),
        (
            {"evaluate_sample": {"number": 1, "fraction": 0.5}},
            "evaluate_sample: give either fraction or number",
        ),
    ],
)
def test_settings_that_do_not_go_together(tiny_base, rows, tmp_path, capsys, settings, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / "run", **settings)), encoding="utf-8"
    )
    assert main(["federate", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_as_many_rounds_as_a_schedule_was_made_for(make_config, tmp_path):
    from braidlora.errors import CheckpointError

    federate(make_config(rounds=1, lr_schedule={"decay": "linear"}), progress=False)
    with pytest.raises(CheckpointError, match=r"federation\.rounds: 1 then, 2 now"):
        federate(make_config(rounds=2, lr_schedule={"decay": "linear"}), resume="auto", progress=False)


def test_who_is_scored_follows_from_seed_and_name_alone():
    names = [f"client-{n}" for n in range(500)]
    few = scored_clients(names, EvaluateSampleSection(), 1)
    assert len(few) == MOST_SCORED
    assert few == scored_clients(reversed(names), EvaluateSampleSection(), 1)
    assert few != scored_clients(names, EvaluateSampleSection(), 2)
    more = scored_clients(names, EvaluateSampleSection(number=30), 1)
    assert few < more
    gone = next(iter(few))
    assert (
        len(few & scored_clients([name for name in names if name != gone], EvaluateSampleSection(), 1)) == 19
    )
    assert len(scored_clients(names, EvaluateSampleSection(fraction=0.1), 1)) == 50
    assert scored_clients(names, EvaluateSampleSection(fraction=1.0), 1) == set(names)
    assert scored_clients(names[:3], EvaluateSampleSection(), 1) == set(names[:3])


def test_a_sample_is_scored_in_every_round_and_all_in_the_end(tiny_base, rows, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    settings = {"rounds": 3, "evaluate_every": 1, "evaluate_sample": {"number": 1}}
    path.write_text(
        yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / "run", **settings)), encoding="utf-8"
    )
    assert main(["federate", str(path), f"--output={tmp_path / 'run'}", "--json"]) == 0
    first, second, last = lines(tmp_path / "run")
    [chosen] = first["sample"]
    for line in (first, second):
        assert {name for name, one in line["clients"].items() if "aggregated" in one} == {chosen}
        assert {name for name, one in line["clients"].items() if "after" in one} == {chosen}
    assert all({"before", "after", "aggregated"} <= one.keys() for one in last["clients"].values())
    assert last["means"]["aggregated"] == last["clients"][chosen]["aggregated"], "the same client as before"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(one["mean"] is not None for one in metrics["clients"].values())
    scores = [one["mean"] for one in metrics["clients"].values()]
    assert metrics["mean"] == pytest.approx(sum(scores) / 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Rounds before the last one scored the same 1 of 3 clients" in page
    assert "--resume auto" in page


def test_scoring_a_sample_changes_no_byte_of_what_is_trained(tiny_base, rows, tmp_path):
    for name, settings in (("all", {}), ("one", {"evaluate_sample": {"number": 1}})):
        config = federated_config(tiny_base, rows, tmp_path / name, evaluate_every=1, **settings)
        federate(config, progress=False)
    found = [
        {key: data for key, data in federation_bytes(tmp_path / name).items() if key.endswith(".safetensors")}
        for name in ("all", "one")
    ]
    assert found[0] == found[1]

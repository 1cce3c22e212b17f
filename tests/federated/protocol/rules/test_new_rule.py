"""A rule of one's own: a spec that is registered at run time goes through every verb, as the built-in ones do."""

import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from synthetic import clients, get, layers, own_update, take, weights

from braidlora.cli import main
from braidlora.errors import ConfigError, FederationError
from braidlora.federated import AdaptedLayer, ClientUpdate, RuleSpec, Turn, get_rule, register_rule
from braidlora.federated.protocol import rules
from braidlora.federated.protocol.guard import Guard, UpdateRejected
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation.driver import federate
from helpers.recipes import federated_recipe
from helpers.tiny_base import TASKS

A, B, BOTH = ("lora_A",), ("lora_B",), ("lora_A", "lora_B")
MEAN = RuleSpec(name="test-mean", label="Test mean", uploads=B, downloads=B)
# B in odd rounds and A in even ones; the other factor is frozen and the same for all, so each round is exact.
TURNS = RuleSpec(
    name="test-turns", label="Test turns", uploads=BOTH, downloads=BOTH, turns=(Turn(B, B, B), Turn(A, A, A)),
    exact=True, needs_shared_init=True,
)  # fmt: skip
SHAPES = [(14, 12), (9, 16)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(rules, "_SPECS", dict(rules._SPECS))
    register_rule(MEAN)
    register_rule(TURNS)


@pytest.fixture
def write_recipe(tiny_base, rows, tmp_path):
    def write(output="run", **overrides):
        path = tmp_path / f"{output}.yaml"
        recipe = federated_recipe(tiny_base, rows, tmp_path / output, **overrides)
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return str(path)

    return write


def adapters(directory, names=TASKS):
    return {
        name: load_file(directory / "clients" / name / "adapter/adapter_model.safetensors") for name in names
    }


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name


def here(recipe):
    """The recipe, and its `output` itself instead of the folder next to it."""
    return [recipe, f"--output={recipe.removesuffix('.yaml')}"]


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def test_every_verb_takes_the_new_rule(write_recipe, make_config, tmp_path, capsys):
    """It is Fed-ALoRA under another name, and ends in its bytes."""
    assert main(["federate", *here(write_recipe("reference", rule="fed-alora")), "--json"]) == 0
    assert main(["federate", *here(write_recipe(rule="test-mean")), "--json"]) == 0
    capsys.readouterr()
    assert_equal(adapters(tmp_path / "run"), adapters(tmp_path / "reference"))

    recipe = str(tmp_path / "run.yaml")
    assert main(["plan", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    planned = {entry["rule"]: entry for entry in plan["rules"] if entry["wire"] is None}
    assert planned["test-mean"] == {**planned["fed-alora"], "rule": "test-mean"}
    sent = [line["bytes"] for line in lines(tmp_path / "run")]
    assert planned["test-mean"]["all_rounds"] == {
        "up_bytes": sum(one["up"] for one in sent), "down_bytes": sum(one["down"] for one in sent),
    }  # fmt: skip

    for name in ("run", "reference"):
        words = ["federate", "add-client", str(tmp_path / name), "--name", "west", "--tasks", "up"]
        assert main([*words, "--epochs", "1", "--json"]) == 0
        added = json.loads(capsys.readouterr().out)
        assert added["trained"] == ["lora_A"]
    assert_equal(adapters(tmp_path / "run", ["west"]), adapters(tmp_path / "reference", ["west"]))

    seen = tmp_path / "seen"
    words = ["analyze", str(tmp_path / "run"), "--gradients", "--rows-per-task=4", "--output", str(seen)]
    assert main(words) == 0
    found = json.loads((seen / "analysis.json").read_text())
    assert found["gradients"]["run"]["shared"] == ["B"]


@pytest.mark.parametrize("rule", ["test-mean", "test-turns"])
def test_an_interrupted_federation_resumes_to_the_same_bytes(rule, write_recipe, make_config, tmp_path):
    options = {"rule": rule, "rounds": 3, "sample": {"number": 2}, "seed": 2}
    full = federate(make_config("full", **options), progress=False)

    def interrupt(server):
        raise KeyboardInterrupt

    recipe = write_recipe(**options)
    closed = []
    close = Server.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Server, "close", lambda s: closed.append(s) or (close if len(closed) == 1 else interrupt)(s)
        )
        with pytest.raises(KeyboardInterrupt):
            federate(make_config(**options), progress=False)
    assert len(lines(tmp_path / "run")) == 1
    assert main(["federate", *here(recipe), "--resume", "auto"]) == 0
    assert_equal(adapters(tmp_path / "run"), adapters(full.directory))


def test_the_recipe_lists_the_new_rule_among_those_that_fit(write_recipe, capsys):
    assert main(["plan", write_recipe(rule="test-mena")]) == 2
    assert "expected 'local'" in (said := capsys.readouterr().err)
    assert "'test-mean' or 'test-turns'" in said
    assert main(["plan", write_recipe(rule="flora", robust={"aggregator": "median"})]) == 2
    assert "fed-alora-het, test-mean and test-turns" in capsys.readouterr().err
    assert main(["plan", write_recipe(rule="test-mean", ranks=[2, 4, 3])]) == 2
    assert (
        "zero-padding, flora, flexlora, raflora and fed-alora-het allow different ranks"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (dataclasses.replace(MEAN, label="Another"), "the name 'test-mean' is taken"),
        (dataclasses.replace(MEAN, name="x", uploads=("lora_C",)), "uploads: unknown factor lora_C"),
        (dataclasses.replace(TURNS, name="x", downloads=B), "downloads: lora_A of its turns missing"),
    ],
)
def test_specs_that_cannot_be_are_refused(spec, says):
    with pytest.raises(ConfigError, match=says):
        register_rule(spec)
    register_rule(MEAN)  # the same one again is


def test_the_guard_rejects_what_the_new_rule_does_not_share():
    rule, made = get_rule("test-mean"), clients("fed-alora", [3, 3], SHAPES)
    names = layers(made[0].state)
    guard = Guard(
        rule, [AdaptedLayer(n, *s) for n, s in zip(names, SHAPES, strict=True)], {c.name: 3 for c in made}
    )
    guard.open(1, [client.name for client in made])
    update = made[0].update(rule, round=1)
    take(guard, update)
    for foreign in (f"{names[0]}.lora_A.weight", f"{names[0]}.base_layer.weight", "score.weight"):
        tensors = {**update.tensors, foreign: torch.zeros(3, 12)}
        with pytest.raises(UpdateRejected, match=rf"{foreign} may not be sent"):
            take(guard, dataclasses.replace(update, client=made[1].name, tensors=tensors))


# A rule that alternates.


def updates_of(rule, made, round):
    for client in made:
        tensors = rule.outgoing(client.state, round)
        yield ClientUpdate(client.name, client.rows, tensors, rank=client.rank, scaling=2.0, round=round)


def test_turns_share_one_factor_per_round_exactly():
    rule, made = get_rule("test-turns"), clients("ffa-lora", [3, 3, 3], SHAPES)  # one A for all
    shared = {name: t for name, t in made[0].state.items() if "lora_A" in name}
    for round, factor in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        updates = list(updates_of(rule, made, round))
        assert all({name.split(".")[-2] for name in one.tensors} == {factor} for one in updates)
        expected = {
            layer: sum(
                p * own_update("test-turns", one, layer) for p, one in zip(weights(made), made, strict=True)
            )
            for layer in layers(made[0].state)
        }
        rule.start(shared, round)
        for one in updates:
            rule.add(one)
        before, shared = shared, rule.finish()
        for layer, W in expected.items():
            merged = 2.0 * get(shared, layer, "lora_B") @ get(shared, layer, "lora_A")
            torch.testing.assert_close(torch.from_numpy(merged), torch.from_numpy(W), atol=1e-12, rtol=0)
        other = {name: t for name, t in before.items() if factor not in name}
        assert all(torch.equal(shared[name], t) for name, t in other.items())
        assert rule.payload_for(shared, 3, round=round).keys() == updates[0].tensors.keys()
        assert rule.catch_up(shared, 3).keys() == shared.keys()
        # Everyone has the shared factors, and trains the next one.
        generator = torch.Generator().manual_seed(round)
        trained = rule.spec.at(round + 1).trains[0]
        for client in made:
            for name in client.state:
                client.state[name] = shared[name].clone()
                if trained in name:
                    client.state[name] += torch.randn(
                        shared[name].shape, generator=generator, dtype=torch.float64
                    )


def test_a_rule_that_alternates_needs_the_round():
    with pytest.raises(FederationError, match=r"alternates .*start\(shared, round\)"):
        get_rule("test-turns").start({})


def test_rule_and_guard_reject_the_factor_of_the_other_turn():
    rule, made = get_rule("test-turns"), clients("fedit", [3, 3], SHAPES)
    names = layers(made[0].state)
    guard = Guard(
        rule,
        [AdaptedLayer(name, *shape) for name, shape in zip(names, SHAPES, strict=True)],
        {client.name: client.rank for client in made},
    )
    for round, factor, other in ((1, "lora_B", "lora_A"), (2, "lora_A", "lora_B"), (3, "lora_B", "lora_A")):
        guard.open(round, [client.name for client in made])
        rule.start({}, round)
        fits, both = (next(updates_of(rule, made, at)) for at in (round, 0))
        wrong = next(updates_of(rule, made, round + 1))
        wrong = dataclasses.replace(wrong, round=round)
        for update in (dataclasses.replace(both, round=round), wrong):
            with pytest.raises(UpdateRejected, match=rf"{other}.*may not be sent; .* \*\.{factor}\.weight"):
                take(guard, update)
            with pytest.raises(FederationError, match=rf"{other}.*may not be sent"):
                rule.add(update)
        take(guard, fits)
        rule.add(fits)


def test_what_travels_in_turns_is_what_was_planned(write_recipe, tmp_path, capsys):
    """With clients that miss rounds, which need both factors."""
    recipe = write_recipe(rule="test-turns", rounds=5, sample={"number": 2})
    assert main(["plan", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    [planned] = [entry for entry in plan["rules"] if entry["rule"] == "test-turns"]
    assert main(["federate", *here(recipe)]) == 0
    rounds = [line["bytes"] for line in lines(tmp_path / "run")]
    ways = {f"{way}_bytes": sum(one[way] for one in rounds) for way in ("up", "down")}
    assert planned["all_rounds"] == ways
    turns = {one["up"] for one in rounds}
    assert len(turns) == 2, "A and B differ in size here"
    assert planned["mean"]["up_bytes"] * 2 * 2 == sum(turns)
    assert rounds[0]["up"] == rounds[2]["up"] == rounds[4]["up"]


def test_a_client_trains_the_factor_of_the_turn_alone(make_config):
    """The first round is FFA-LoRA's, to the byte; after the second all clients have one model."""
    ffa, one, two = (
        adapters(federate(make_config(output, rule=rule, rounds=rounds), progress=False).directory)
        for output, rule, rounds in (
            ("ffa", "ffa-lora", 1),
            ("one", "test-turns", 1),
            ("two", "test-turns", 2),
        )
    )
    assert_equal(one, ffa)
    assert_equal(two, dict.fromkeys(two, two["up"]))
    for name, tensor in two["up"].items():
        assert torch.equal(tensor, one["up"][name]) == ("lora_B" in name), name


@pytest.mark.parametrize("options", [{"client_init": "independent"}, {"optimizer_state": "keep"}])
def test_settings_that_do_not_go_with_turns_are_refused(options, write_recipe, capsys):
    assert main(["plan", write_recipe(rule="test-turns", **options)]) == 2
    assert f"federation.{next(iter(options))}: test-turns" in capsys.readouterr().err

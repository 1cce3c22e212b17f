"""FedProx and FedAvgM, and rules with a state of their own, through whole federations and interruptions."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from braidlora.cli import main
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.host import Host
from helpers.recipes import federated_recipe
from helpers.tiny_base import TASKS

STEPS = {"adapter__lora_dropout": 0.0, "training__optimizer": "sgd", "training__scheduler": "constant",
         "training__max_grad_norm": 0.0, "training__learning_rate": 0.1}  # fmt: skip


def adapters(directory):
    return {
        name: load_file(directory / "clients" / name / "adapter/adapter_model.safetensors") for name in TASKS
    }


def assert_equal(one, two):
    for name in one:
        assert one[name].keys() == two[name].keys()
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name


def trained(config, steps):
    """A client's factors after so many steps from its start, by name, in float64."""
    from braidlora.federated.protocol.client import first_state

    config = config.model_copy(
        update={
            "federation": config.federation.model_copy(
                update={"local": type(config.federation.local)(steps=steps)}
            )
        }
    )
    clients, host = load_clients(config), Host(config, None)
    client = clients.by_name["up"]
    state = first_state(host, client, "x")
    start = {n: t + 0.05 for n, t in state.tensors.items()}
    host.load(client.rank, client.scaling, start, host.rule.spec.at(1).trains)
    host.train(client, 1, 7, {})
    return start, {n: t.double() for n, t in host.read().items()}


@pytest.mark.parametrize(
    ("rule", "pulled"), [("fedit", "AB"), ("fed-alora", "B"), ("fedsa-lora", "A"), ("rolora", "B")]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fedprox_pulls_what_was_sent_to_where_it_was(rule, pulled, accumulation, make_config):
    """Two steps of SGD: θ₂ − θ₁ has −η μ (θ₁ − θ₀) more than without; in the first step there is nothing to pull."""
    options = {**STEPS, "rule": rule, "training__batch_size": 4 // accumulation,
               "training__gradient_accumulation": accumulation}  # fmt: skip
    mu, eta = 0.8, 0.1
    plain, prox = make_config(**options), make_config(**options, proximal_mu=mu)
    start, one = trained(plain, 1)
    _, same = trained(prox, 1)
    _, two = trained(plain, 2)
    _, near = trained(prox, 2)
    for name, theta in one.items():
        torch.testing.assert_close(same[name], theta, atol=1e-7, rtol=0)
        pull = eta * mu * (theta - start[name].double()) if name.split("_")[-1][0] in pulled else 0.0
        torch.testing.assert_close(near[name], two[name] - pull, atol=2e-7, rtol=0)
    moved = max(float((near[name] - two[name]).abs().max()) for name in two)
    assert moved > 1e-5


def test_fedprox_is_part_of_the_objective_and_not_of_the_reported_loss(make_config):
    losses = []
    for mu in (0.0, 5.0):
        config = make_config(f"run{mu}", rounds=1, proximal_mu=mu, training__learning_rate=1e-6)
        result = federate(config, progress=False)
        [line] = (result.directory / "rounds.jsonl").read_text().splitlines()
        losses.append([one["loss"] for one in json.loads(line)["clients"].values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


CASES = [
    ("rolora", {}),
    ("rolora", {"server_momentum": 0.9}),
    ("fedit", {"server_momentum": 0.9, "server_learning_rate": 0.5, "proximal_mu": 0.1}),
    ("fed-alora-het", {"server_momentum": 0.5, "ranks": [2, 4, 3]}),
    ("raflora", {"ranks": [2, 4, 3], "proximal_mu": 0.1}),
    ("fedalt", {}),
    ("fedalt", {"upload_dtype": "bfloat16", "optimizer_state": "keep"}),
]


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_interrupted_and_resumed_to_the_same_bytes(rule, options, make_config, tiny_base, rows, tmp_path):
    """With clients that miss rounds; what a rule or the server carries along is part of the round."""
    options = {"rule": rule, "rounds": 4, "sample": {"number": 2}, "seed": 2, **options}
    full = federate(make_config("full", **options), progress=False)
    close, closed = Server.close, []

    def interrupted(server):
        closed.append(server)
        if len(closed) == 3:
            raise KeyboardInterrupt
        return close(server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            federate(make_config(**options), progress=False)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / "run", **options)), encoding="utf-8"
    )
    assert main(["federate", str(recipe), f"--output={tmp_path / 'run'}", "--resume", "auto"]) == 0
    assert_equal(adapters(tmp_path / "run"), adapters(full.directory))
    last = "rounds/round-4/shared.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (full.directory / last).read_bytes()
    assert main(["verify", str(tmp_path / "run")]) == 0
    velocity = tmp_path / "run" / "rounds/round-4/velocity.safetensors"
    assert velocity.is_file() == ("server_momentum" in options or "server_learning_rate" in options)


def test_a_rolled_back_federation_has_the_velocity_of_that_round(make_config, tmp_path):
    options = {"rule": "fedit", "server_momentum": 0.9, "rounds": 3, "keep_rounds": 3}
    federate(make_config(**options), progress=False)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    federate(make_config(**options), resume="auto", rollback=1, progress=False)
    for part in ("shared", "velocity"):
        path = f"rounds/round-3/{part}.safetensors"
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "kept" / path).read_bytes()


def test_a_damaged_velocity_is_found(make_config, tmp_path, capsys):
    federate(make_config(rule="fedit", server_momentum=0.9), progress=False)
    path = tmp_path / "run/rounds/round-2/velocity.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "run")]) == 5
    said = capsys.readouterr()
    assert "velocity.safetensors" in said.out + said.err


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        ("flora", {"server_momentum": 0.9}, "every round adds a new stack"),
        ("flexlora", {"server_momentum": 0.9}, "a different basis in every round"),
        ("raflora", {"server_learning_rate": 0.5}, "a different basis in every round"),
        ("fedalt", {"server_momentum": 0.9}, "subtracts its own part"),
        ("local", {"server_momentum": 0.9}, "nothing is aggregated"),
        ("local", {"proximal_mu": 0.1}, "receive no factor"),
        (
            "flora",
            {"proximal_mu": 0.1},
            "no factor that a client trains starts the round at the value it received",
        ),
        ("fed-alora-het", {"proximal_mu": 0.1}, "no factor that a client trains"),
        ("fedalt", {"proximal_mu": 0.1}, "no factor that a client trains"),
        (
            "fedalt",
            {"robust": {"aggregator": "median"}},
            "median cannot be used with fedalt: a client subtracts",
        ),
        ("fedalt", {"ranks": [2, 4, 3]}, "fedalt needs one rank"),
        ("rolora", {"client_init": "independent"}, "rolora needs `shared`"),
        ("rolora", {"optimizer_state": "keep"}, "trains different factors"),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_reason(rule, options, says, make_config):
    with pytest.raises(ValueError, match=says):
        make_config(rule=rule, **options)


@pytest.mark.parametrize(("rule", "factors"), [("rolora", "AB"), ("raflora", "AB"), ("fedalt", "AB")])
def test_a_client_joins_afterward(rule, factors, make_config, tmp_path, capsys):
    federate(make_config(rule=rule), progress=False)
    words = [
        "federate",
        "add-client",
        str(tmp_path / "run"),
        "--name",
        "west",
        "--tasks",
        "up",
        "--epochs",
        "1",
    ]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    added = json.loads(capsys.readouterr().out)
    wanted = [f"lora_{factor}" for factor in factors] + (["mixer"] if rule == "fedalt" else [])
    assert added["trained"] == wanted
    state = load_file(tmp_path / "run/clients/west/adapter/adapter_model.safetensors")
    if rule == "fedalt":
        shared = load_file(tmp_path / "run/rounds/round-2/shared.safetensors")
        for name, mean in shared.items():
            stack = state[name.replace("rest_", "braidlora_")]
            half = stack.chunk(2, 0 if "_A" in name else 1)[1]
            assert torch.equal(half, mean), "it took part in no round: the mean of all is that of the others"
    else:
        assert {name.split(".")[-2] for name in state} == {"lora_A", "lora_B"}


def test_the_plan_of_a_pair_counts_what_is_trained(tiny_base, rows, tmp_path, capsys):
    recipe = tmp_path / "run.yaml"
    plans = {}
    for rule in ("fedit", "fedalt", "rolora"):
        recipe.write_text(yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / "run", rule=rule)))
        assert main(["plan", str(recipe), "--json"]) == 0
        plans[rule] = json.loads(capsys.readouterr().out)
    one, two = plans["fedit"]["adapters"][0], plans["fedalt"]["adapters"][0]
    assert two["trainable_parameters"] == one["trainable_parameters"] + plans["fedit"]["layers"] * 2 * 32
    assert two["file_bytes"] > one["file_bytes"]
    memory = [plans[rule]["memory"] for rule in ("fedit", "fedalt")]
    assert memory[1]["gradients"] == 4 * two["trainable_parameters"]
    traffic = {one["rule"]: one for one in plans["fedalt"]["rules"]}
    assert traffic["fedalt"]["mean"]["up_parameters"] == traffic["fedit"]["mean"]["up_parameters"]
    assert traffic["rolora"]["mean"]["up_parameters"] * 2 == traffic["fedit"]["mean"]["up_parameters"]
    federate_result = main(["federate", str(recipe), f"--output={tmp_path / 'run'}"])
    assert federate_result == 0
    saved = tmp_path / "run/clients/up/adapter/adapter_model.safetensors"
    assert saved.stat().st_size == plans["rolora"]["adapters"][0]["file_bytes"]

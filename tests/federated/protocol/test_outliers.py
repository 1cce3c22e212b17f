"""A change that is out of all proportion: left out, by name; what is legitimate passes."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from seven_clients import LAYERS, Round, recipe
from spoiled import changed, lines

from braidlora.errors import ConfigError, FederationError
from braidlora.federated import RULE_NAMES
from braidlora.federated.protocol.guard import UpdateRejected
from braidlora.federated.protocol.outliers import Typical, outliers
from braidlora.federated.protocol.rules import spec_of
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.spool import Spool

SHARING = [name for name in RULE_NAMES if name != "local"]


@pytest.mark.parametrize(
    ("sizes", "before", "found"),
    [
        ({"a": 1.0, "b": 1.2, "c": 0.8, "d": 1e3}, None, ["d"]),
        ({"a": 1.0, "b": 99.0}, None, []),
        ({"a": 1.0, "b": 101.0}, None, ["b"]),  # of two
        ({"a": 1.0, "b": 1e3, "c": 1e3}, None, []),  # two of three are no exception
        ({"a": 1.0, "b": 2.0, "c": 1e3, "d": 1e6}, None, ["c", "d"]),
        ({"a": 1e3, "b": 2e3, "c": 3e3}, 1.0, []),  # all large together
        ({"a": 1e3}, None, []),  # alone, and nothing known
        ({"a": 1e3}, 1.0, ["a"]),
        ({"a": 50.0}, 1.0, []),
        ({"a": 1e3, "b": 0.0}, None, []),  # who did not move says nothing about the others
        ({"a": 1e3, "b": 0.0}, 1.0, ["a"]),
        ({"a": 1e-6, "b": 0.05}, None, []),  # harmless, however little the other moved
        ({"a": 0.0}, 0.0, []),
        ({}, None, []),
    ],
)
def test_who_stands_apart(sizes, before, found):
    left_out = outliers(sizes, None if before is None else Typical(before), 100.0, 0.1)
    assert list(left_out) == found
    assert all("federation.change_cap" in why and "100 times" in why for why in left_out.values())


@pytest.mark.parametrize(
    ("sizes", "work", "before", "found"),
    [
        ({"a": 1.0, "b": 900.0}, {"a": 1, "b": 5}, None, []),  # five times as long: up to 2,500 times as far
        ({"a": 1.0, "b": 2600.0}, {"a": 1, "b": 5}, None, ["b"]),
        (
            {"a": 1.0, "b": 900.0},
            {"a": 5, "b": 1},
            None,
            ["b"],
        ),  # who worked less has no less room, and no more
        ({"a": 1.0, "b": 90.0}, {"a": 5, "b": 1}, None, []),
        ({"a": 900.0}, {"a": 5}, Typical(1.0, 1.0), []),  # another client, alone, in the round before
        ({"a": 900.0}, {"a": 5}, Typical(1.0, 5.0), ["a"]),
        ({"a": 900.0}, {"a": 5}, Typical(1.0), ["a"]),  # a work that is not known excuses nothing
        ({"a": 1.0, "b": 1.0, "c": 1e6}, {"a": 500, "b": 1, "c": 500}, None, ["c"]),
    ],
)
def test_who_worked_longer_may_have_moved_further(sizes, work, before, found):
    assert list(outliers(sizes, before, 100.0, 0.1, work)) == found


def test_one_row_beside_a_thousand_leaves_out_nobody(make_config, rows, tmp_path):
    """Products grow with the square of the steps, and the change of the long training is far beyond 100 times."""
    for name, count in (("few", 1), ("many", 1000)):
        line = json.dumps({"instruction": "up", "input": "abcd", "output": "ABCD"})
        (rows / f"{name}.jsonl").write_text(f"{line}\n" * count)
    tasks = [
        {"name": name, "train": str(rows / f"{name}.jsonl"), "max_new_tokens": 1} for name in ("few", "many")
    ]
    config = make_config(
        rule="flora", rounds=2, split={"test": 0.0}, tasks=tasks, training__learning_rate=0.02
    )
    federate(config, progress=False)
    for line in lines(tmp_path / "run"):
        assert "failed" not in line
        norms = {name: one["norm"] for name, one in line["clients"].items()}
        assert norms["many"] > 100 * norms["few"] or line["round"] > 1, norms


def multiplied(federation, factor, name="c3"):
    """For `Round.run`: one client's change against what it was sent is multiplied."""
    before = federation.server._before

    def spoilt(update):
        if update.client != name:
            return update
        tensors = {}
        for key, tensor in update.tensors.items():
            start = before.get(key, torch.zeros_like(tensor))
            start = start[tuple(slice(size) for size in tensor.shape)]
            tensors[key] = start + factor * (tensor - start)
        return dataclasses.replace(update, tensors=tensors)

    return spoilt


@pytest.mark.parametrize("ranks", [None, [2, 4, 1, 3, 4, 2, 1]])
@pytest.mark.parametrize("rule", SHARING)
def test_times_a_thousand_is_left_out_and_its_opposite_passes(rule, ranks):
    """The aggregate is that of the rest; a flipped sign is no matter of size."""
    options = {} if ranks is None else {"ranks": ranks}
    if ranks and spec_of(rule).ranks == "equal":
        pytest.skip("equal ranks")
    federation = Round(recipe(rule, **options))
    assert federation.run(1, multiplied(federation, -1.0))[0] == ""
    assert federation.left_out == {}
    why_not, updates = federation.run(2, multiplied(federation, 1000.0))
    assert why_not == ""
    assert list(federation.left_out) == ["c3"]
    assert federation.server.state().shared_round == 2
    assert federation.server.state().counted["c3"] == 1
    assert federation.server.changes.keys() == set(updates) - {"c3"}
    assert federation.server.guard.missing == ["c3"]
    for tensor in federation.server.state().shared.values():
        assert float(tensor.abs().max()) < 100.0


@pytest.mark.parametrize("rule", SHARING)
def test_times_a_thousand_passes_where_the_bound_is_switched_off(rule):
    federation = Round(recipe(rule, change_cap=None))
    assert federation.run(1, multiplied(federation, 1000.0))[0] == ""
    assert "c3" in federation.server.changes


@pytest.mark.parametrize("cap", [100.0, None])
@pytest.mark.parametrize("rule", SHARING)
def test_no_bound_lets_a_value_beyond_all_models_pass(rule, cap):
    """Under every rule, and whoever else takes part: here nobody."""
    federation = Round(recipe(rule, change_cap=cap, sample={"number": 1}))
    [name] = federation.server.sample(1)
    with pytest.raises(UpdateRejected, match=r"values of size .*e\+\d+; expected at most 1e\+09"):
        federation.run(1, multiplied(federation, 1e30, name))
    assert federation.server.guard.accepted == set()


def test_all_large_together_count():
    federation = Round(recipe("fedit"))
    for number, size in ((1, 1.0), (2, 5000.0)):

        def enlarged(update, size=size):
            return dataclasses.replace(update, tensors={n: size * t for n, t in update.tensors.items()})

        assert federation.run(number, enlarged)[0] == ""
        assert federation.left_out == {}


@pytest.mark.parametrize("rule", SHARING)
def test_one_client_is_compared_with_the_round_before(rule):
    federation = Round(recipe(rule, sample={"number": 1}))
    assert federation.run(1)[0] == ""
    assert federation.server.state().typical.size > 0
    [name] = federation.server.sample(2)
    shared = federation.server.state().shared
    assert "0 of 1 clients" in federation.run(2, multiplied(federation, 1e6, name))[0]
    assert list(federation.left_out) == [name]
    assert "last round" in federation.left_out[name]
    assert federation.server.state().shared is shared
    assert federation.server.state().shared_round == 1


@pytest.mark.parametrize("factor", [1e30, 1e3])
def test_a_whole_federation_goes_on_without_it(make_config, tmp_path, spoil, factor):
    """The line says who and why, its state stays what it was, and the round is that of the rest."""
    spoil("len", changed(tensors=lambda t: {n: factor * x for n, x in t.items()}), rounds=(2,))
    federate(make_config(rounds=3, evaluate_every=1), progress=False)
    first, second, third = lines(tmp_path / "run")
    failed = second["failed"]["len"]
    assert failed["left_out"]
    assert second["counted"]
    assert (
        "federation.change_cap" in failed["why"][-1]
        if factor == 1e3
        else "expected at most 1e+09" in failed["why"][-1]
    )
    assert len(failed["why"]) == 1, "the same training would give the same"
    assert set(second["bytes"]) == {"up", "down"}
    for line in (first, third):
        assert "failed" not in line
        for one in line["clients"].values():
            assert one["norm"] > 0
            assert 0 < one["weight"] < 1
            assert -1 <= one["cosine"] <= 1
    assert sum(one["weight"] for one in third["clients"].values()) == pytest.approx(1.0)
    server = json.loads((tmp_path / "run" / "rounds" / "round-2" / "server.json").read_text())
    assert server["counted"] == {"len": 1, "rev": 2, "up": 2}
    assert server["typical"]["size"] > 0
    shared = load_file(tmp_path / "run" / "rounds" / "round-2" / "shared.safetensors")
    assert all(float(tensor.abs().max()) < 10 for tensor in shared.values())
    assert not list((tmp_path / "run").rglob("updates")), "what was held during a round is gone"


def test_a_lone_client_out_of_proportion_ends_as_any_failure_does(make_config, tmp_path, spoil):
    clients = [{"name": "up", "tasks": ["up", "rev", "len"]}]
    spoil("up", changed(tensors=lambda t: {n: 1e4 * x for n, x in t.items()}), rounds=(2,))
    with pytest.raises(FederationError, match=r"round 2.*change_cap"):
        federate(make_config(clients=clients), progress=False)


def test_aggregators_that_bound_changes_keep_every_reply():
    """A Krum that counts on 2f + 3 replies must not lose one to the bound."""
    for robust in ({"aggregator": "krum", "f": 2}, {"aggregator": "norm-clip", "max_norm": 0.5}):
        federation = Round(recipe("fed-alora", robust=robust))
        assert federation.run(1, multiplied(federation, 1000.0))[0] == ""
        assert federation.left_out == {}


class TestSpool:
    @pytest.mark.parametrize(("updates", "files"), [(0, 7), (3, 4), (7, 0)])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_is_a_mapping_of_updates_and_leaves_nothing(self, tmp_path, updates, files, dtype):
        """So many of seven fit into the memory that it may take."""
        federation = Round(recipe("fedit", upload_dtype=dtype))
        numbers = 4 * sum(layer.in_features + layer.out_features for layer in LAYERS)
        spool = Spool(memory=updates * numbers * (4 if dtype == "float32" else 2))
        server = Server(federation.config, federation.clients, LAYERS, federation.host.head, held=spool)
        took = []
        federation.run(1, lambda update: took.append(update) or update)
        with spool.use(tmp_path / "updates"):
            server.open(1, server.sample(1))
            for update in took:
                server.take(update)
            assert len(list((tmp_path / "updates").iterdir())) == files
            assert len(spool) == 7
            back = spool["c2"]
            [sent] = [update for update in took if update.client == "c2"]
            assert dataclasses.replace(back, tensors={}) == dataclasses.replace(sent, tensors={})
            assert all(torch.equal(back.tensors[n], t) for n, t in sent.tensors.items())
            del spool["c2"]
            assert "c2" not in spool
            spool["c2"] = sent
            assert server.close() == ""
            assert list((tmp_path / "updates").iterdir()) == []
        assert not (tmp_path / "updates").exists()

    def test_the_same_bytes_as_from_memory(self, tmp_path):
        shared = []
        for held in (None, Spool(memory=0)):
            federation = Round(recipe("flexlora", ranks=[2, 4, 1, 3, 4, 2, 1]))
            federation.server = Server(
                federation.config, federation.clients, LAYERS, federation.host.head, held=held
            )
            if held is None:
                federation.run(1)
            else:
                with held.use(tmp_path / "updates"):
                    federation.run(1)
            shared.append(federation.server.state().shared)
        assert shared[0].keys() == shared[1].keys()
        assert all(torch.equal(shared[0][n], t) for n, t in shared[1].items())


@pytest.mark.parametrize("fault", ["change", "hold"])
def test_an_update_that_cannot_be_taken_leaves_no_trace(monkeypatch, fault):
    """Whatever breaks on the way: the client may send it again, and the round is as if it had come once."""
    calm, federation = Round(recipe("fedit")), Round(recipe("fedit"))
    calm.run(1)
    server, broken = federation.server, []
    take = server.take

    class Full(dict):
        def __setitem__(self, client, update):
            if client == "c3" and not broken:
                broken.append(client)
                raise FederationError("no room")
            super().__setitem__(client, update)

    change = server._rule.change

    def failing(update, before):
        if update.client == "c3" and not broken:
            broken.append(update.client)
            raise FederationError("it does not add up")
        return change(update, before)

    if fault == "hold":
        server._held = Full()
    else:
        monkeypatch.setattr(server._rule, "change", failing)

    def twice(update):
        if update.client == "c3":
            with pytest.raises(FederationError, match=r"no room|add up"):
                take(update)
            assert "c3" not in server.guard.accepted
        take(update)

    server.take = twice
    federation.run(1)
    assert broken == ["c3"]
    assert all(torch.equal(server.state().shared[n], t) for n, t in calm.server.state().shared.items())


@pytest.mark.parametrize("name", ["change_cap=0.5", "change_cap=inf"])
def test_bounds_that_make_no_sense(name):
    key, value = name.split("=")
    with pytest.raises((ConfigError, ValueError), match="change_cap"):
        recipe("fedit", **{key: float(value)})

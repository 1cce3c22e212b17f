"""The common test where heads stay with their clients: nobody is scored with a head that was never trained."""

import json

import pytest

from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.table import format_federation


@pytest.fixture
def two_tasks(rows, tmp_path):
    """A task of yes and no, and one of other labels."""
    lines = (rows / "rev-labels.jsonl").read_text().splitlines()
    other = [json.loads(line) for line in lines]
    path = tmp_path / "parity.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": one["text"], "label": "odd" if i % 2 else "even"}) + "\n"
            for i, one in enumerate(other)
        )
    )
    tasks = [
        {"name": "up", "kind": "classify", "train": str(rows / "up-labels.jsonl")},
        {"name": "parity", "kind": "classify", "train": str(path)},
    ]
    clients = [{"name": "north", "tasks": ["up"]}, {"name": "south", "tasks": ["parity"]}]
    return {"kind": "classify", "tasks": tasks, "clients": clients}


@pytest.mark.parametrize("rule", ["fed-alora", "local"])
def test_clients_are_left_out_where_their_own_head_was_not_trained(make_config, two_tasks, rule):
    config = make_config(rule=rule, common_test=["up", "parity"], evaluate_every=1, **two_tasks)
    metrics = federate(config, progress=False).metrics
    for client, task, other in (("north", "up", "parity"), ("south", "parity", "up")):
        assert metrics["common"]["left_out"][client] == [other]
        assert (
            metrics["clients"][client]["common"]["aggregated"]
            == metrics["clients"][client]["common"]["tasks"][task]["score"]
        )
    assert "federation.share_head is false" in metrics["common"]["left_out_reason"]
    assert (
        "not in the common test, because their own heads were not trained for it: north (parity), south (up)"
        in (format_federation(metrics))
    )


def test_who_has_no_head_for_any_of_it_has_no_score(make_config, two_tasks):
    config = make_config(common_test=["parity"], **two_tasks)
    metrics = federate(config, progress=False).metrics
    assert "common" not in metrics["clients"]["north"]
    assert metrics["common"]["left_out"] == {"north": ["parity"]}
    assert metrics["common"]["aggregated"] == metrics["clients"]["south"]["common"]["aggregated"]


def test_a_shared_head_is_scored_on_all_of_it(make_config, two_tasks):
    metrics = federate(
        make_config(common_test=["up", "parity"], share_head=True, **two_tasks), progress=False
    ).metrics
    assert "left_out" not in metrics["common"]
    for client in ("north", "south"):
        assert metrics["clients"][client]["common"]["tasks"].keys() == {"up", "parity"}

"""Dividing one task's rows: nobody's row is lost or doubled, and shares are what was asked for."""

import json

import numpy as np
import pytest

from braidlora.config import FederatedConfig, PartitionSection
from braidlora.errors import ConfigError, DataError
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.partition import divide, group
from braidlora.tasks import load_tasks
from helpers.recipes import federated_recipe

LABELS = {"train": ["a"] * 600 + ["b"] * 300 + ["c"] * 100, "validation": [], "test": ["a"] * 60 + ["c"] * 40}


def section(**settings):
    return PartitionSection.model_validate({"clients": 10, **settings})


@pytest.mark.parametrize("how", [{}, {"by": "dirichlet", "alpha": 0.1}, {"by": "dirichlet", "alpha": 100.0}])
def test_every_row_belongs_to_one_client(how):
    clients = divide(LABELS, section(**how))
    assert len(clients) == 10
    for part, rows in LABELS.items():
        assert sorted(row for client in clients for row in client[part]) == list(range(len(rows)))
        assert all(client[part] == sorted(client[part]) for client in clients)
    assert min(len(client["train"]) for client in clients) >= 10
    assert clients == divide(LABELS, section(**how)), "the same seed, the same rows"
    assert clients != divide(LABELS, section(**how, seed=1))


def test_iid_gives_as_many_rows_to_each():
    clients = divide(LABELS, section(clients=7))
    assert {len(client["train"]) for client in clients} == {142, 143}
    assert {len(client["test"]) for client in clients} == {14, 15}


def spread(clients):
    """Mean distance of the clients' label shares from the whole's (total variation)."""
    labels = np.array(LABELS["train"])
    whole = np.array([(labels == label).mean() for label in "abc"])
    shares = [np.array([(labels[one["train"]] == label).mean() for label in "abc"]) for one in clients]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


def test_a_small_alpha_is_uneven_and_a_large_one_even():
    spreads = [spread(divide(LABELS, section(by="dirichlet", alpha=alpha))) for alpha in (0.1, 1.0, 100.0)]
    assert spreads[0] > 0.4 > spreads[1] > 0.1 > spreads[2]


def test_label_shares_are_dirichlet():
    """Mean 1/N and variance (N − 1) / (N² (N α + 1)) of a client's share of a label, over many seeds."""
    n, alpha = 5, 0.5
    rows = {"train": ["a"] * 1000, "test": []}
    draws = [
        divide(rows, section(clients=n, by="dirichlet", alpha=alpha, min_rows=1, seed=seed))
        for seed in range(300)
    ]
    shares = np.array([[len(client["train"]) / 1000 for client in draw] for draw in draws])
    assert shares.mean() == pytest.approx(1 / n)
    # Draws that leave a client without a row are made again, which takes away a little of the variance.
    assert shares.var() == pytest.approx((n - 1) / (n**2 * (n * alpha + 1)), rel=0.12)


def test_test_rows_follow_the_training_rows():
    clients = divide(LABELS, section(by="dirichlet", alpha=1.0))
    train, test = np.array(LABELS["train"]), np.array(LABELS["test"])
    ours = np.array([(train[one["train"]] == "a").sum() for one in clients]) / 600
    theirs = np.array([(test[one["test"]] == "a").sum() for one in clients]) / 60
    assert np.abs(ours - theirs).max() <= 1 / 60 + 1e-9


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="1000 training rows cannot be divided by iid"):
        divide(LABELS, section(min_rows=101))
    with pytest.raises(DataError, match="a higher alpha"):
        divide(LABELS, section(by="dirichlet", alpha=0.01, min_rows=90))


def test_groups_are_the_values_of_a_column():
    assert group({"train": ["x", "y", "x"], "test": ["y"]}) == {
        "x": {"train": [0, 2], "test": []},
        "y": {"train": [1], "test": [0]},
    }


# ---- through recipes


@pytest.fixture
def load(tiny_base, rows, tmp_path):
    def read(**overrides):
        given = {"kind": "classify", "tasks": [task(rows)], **overrides}
        return load_clients(
            FederatedConfig.model_validate(federated_recipe(tiny_base, rows, tmp_path / "run", **given))
        )

    return read


def task(rows, **more):
    return {"name": "up", "kind": "classify", "train": str(rows / "up-labels.jsonl"), **more}


def test_a_partition_by_labels_has_a_report(load):
    clients = load(partition={"clients": 3, "by": "dirichlet", "alpha": 0.5, "min_rows": 2})
    report = clients.report()
    assert list(report) == ["client-1", "client-2", "client-3"]
    train = [one["tasks"]["up"]["train"] for one in report.values()]
    assert sum(one["rows"] for one in train) == 19
    assert all(sum(one["values"].values()) == one["rows"] for one in train)
    assert len({one["sha256"] for one in train}) == 3


def test_the_places_of_divided_rows_are_written_down(load, tiny_base, rows, tmp_path):
    clients = load(partition={"clients": 3, "by": "dirichlet", "alpha": 0.5, "min_rows": 2})
    given = federated_recipe(tiny_base, rows, tmp_path / "run", kind="classify", tasks=[task(rows)])
    [whole] = load_tasks(FederatedConfig.model_validate(given))
    lines = [json.loads(line) for line in clients.row_numbers().splitlines()]
    for part in ("train", "test"):
        own = [line for line in lines if line["part"] == part]
        assert sorted(row for line in own for row in line["rows"]) == list(range(len(whole.rows(part))))
        for line in own:
            [divided] = clients.by_name[line["client"]].own_tasks()
            assert divided.rows(part) == [whole.rows(part)[row] for row in line["rows"]]
    assert load().row_numbers() == ""


def test_a_partition_by_column_names_clients_after_its_values(load, rows):
    clients = load(partition={"by": "column", "column": "site", "min_rows": 1}).by_name
    raw = [json.loads(line) for line in (rows / "up-labels.jsonl").read_text().splitlines()]
    assert set(clients) == {row["site"] for row in raw}
    for name, client in clients.items():
        [own] = client.own_tasks()
        assert own.train + own.test
        assert all(row["text"].split()[1] == name and "column" not in row for row in own.train + own.test)
    with pytest.raises(DataError, match="no column 'sight'"):
        load(partition={"by": "column", "column": "sight", "min_rows": 1})
    with pytest.raises(DataError, match="fewer than min_rows"):
        load(partition={"by": "column", "column": "site", "min_rows": 8})
    with pytest.raises(ConfigError, match=r"the partition gives 6 clients.*\n.*2 ranks for 6 clients"):
        load(partition={"by": "column", "column": "site", "min_rows": 1}, rule="flora", ranks=[2, 4])


def test_a_partition_by_file_has_a_client_per_file(load, rows, tmp_path):
    for part, count in (("train", 8), ("test", 3)):
        (tmp_path / part).mkdir()
        for name in ("north", "south"):
            source = rows / f"{'up' if name == 'north' else 'rev'}-labels.jsonl"
            text = source.read_text().splitlines()
            (tmp_path / part / f"{name}.jsonl").write_text("\n".join(text[:count]) + "\n")
    given = task(rows, train=str(tmp_path / "train"), test=str(tmp_path / "test"), options=["no", "yes"])
    clients = load(tasks=[given], partition={"by": "file"}).by_name
    assert {name: (len(one.tasks[0].train), len(one.tasks[0].test)) for name, one in clients.items()} == {
        "north": (8, 3), "south": (8, 3),
    }  # fmt: skip
    assert clients["north"].tasks[0].train[0]["text"].startswith("up")
    (tmp_path / "test" / "west.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="has west, but"):
        load(tasks=[given], partition={"by": "file"})
    with pytest.raises(DataError, match="is not a folder"):
        load(partition={"by": "file"})


def test_generated_rows_are_divided_by_their_answers(tiny_base, rows, tmp_path):
    tasks = [{"name": "mood", "train": {"source": "generated:mood", "limit": 60}}]
    data = federated_recipe(
        tiny_base, rows, tmp_path / "run", tasks=tasks, partition={"clients": 2, "by": "dirichlet"}
    )
    data["tasks"][0]["test"] = {"source": "generated:mood", "limit": 10}
    del data["split"]
    clients = load_clients(FederatedConfig.model_validate(data)).by_name
    assert sum(len(one.tasks[0].train) for one in clients.values()) == 60
    data["federation"]["partition"] = {"by": "column", "column": "site"}
    with pytest.raises(ConfigError, match="have no columns of their own"):
        load_clients(FederatedConfig.model_validate(data))


def test_a_file_may_begin_with_what_no_name_begins_with(load, rows, tmp_path):
    """And a test file that is no folder is every client's, and in the common test once."""
    (tmp_path / "train").mkdir()
    for name in ("_north", "south west"):
        (tmp_path / "train" / f"{name}.jsonl").write_text((rows / "up-labels.jsonl").read_text())
    given = task(
        rows, train=str(tmp_path / "train"), test=str(rows / "len-labels.jsonl"), options=["no", "yes"]
    )
    clients = load(tasks=[given], partition={"by": "file"}, common_test=["up"])
    assert list(clients.by_name) == ["north", "south-west"]
    assert [len(one.tasks[0].test) for one in clients.by_name.values()] == [10, 10]
    assert [len(one.test) for one in clients.common] == [10]

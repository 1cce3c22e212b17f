"""A site loads its own rows alone, and they are those that the simulation gives the client."""

import shutil

import pytest

from braidlora.config import DataSource
from braidlora.errors import ConfigError, DataError, DataWarning
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.load import check_for_sites, load_site, warn_of_site
from helpers.recipes import federated_config
from helpers.tiny_base import TASKS

LABELS = ["no", "yes"]


@pytest.fixture
def at_site(tiny_base, rows, tmp_path):
    """A recipe whose tasks lie in a folder that has the rows of `up` alone."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("up.jsonl", "up-labels.jsonl"):
        shutil.copy(rows / name, folder)

    def make(options=None, **settings):
        config = federated_config(tiny_base, folder, tmp_path / "run", **settings)
        tasks = [task.model_copy(update={"options": options}) for task in config.tasks]
        return config.model_copy(update={"tasks": tasks}) if options else config

    return make


def same(site, client):
    assert (site.name, site.rank, site.scaling, site.seed) == (
        client.name,
        client.rank,
        client.scaling,
        client.seed,
    )
    assert [task.name for task in site.tasks] == [task.name for task in client.tasks]
    for ours, theirs in zip(site.tasks, client.tasks, strict=True):
        assert (ours.train, ours.test, ours.labels, ours.metric) == (
            theirs.train, theirs.test, theirs.labels, theirs.metric,
        )  # fmt: skip


def test_only_its_own_rows_are_read(at_site, make_config):
    settings = {"ranks": [2, 4, 3], "rule": "flora"}
    site = load_site(at_site(**settings), "up")
    same(site.client, load_clients(make_config(**settings)).by_name["up"])
    assert site.label_space is None
    with pytest.raises(DataError, match=r"rev\.jsonl"):
        load_site(at_site(**settings), "rev")
    with pytest.raises(ConfigError, match="no client 'west'; they are len, rev, up"):
        load_site(at_site(**settings), "west")


def test_labels_of_all_tasks_must_be_known(at_site, make_config):
    everyone = load_clients(make_config(kind="classify"))
    with pytest.raises(ConfigError, match=r"tasks\.\w+\.options: missing.*listed there, in the same order"):
        load_site(at_site(kind="classify"), "up")
    listed = load_site(at_site(LABELS, kind="classify"), "up")
    given = load_site(at_site(kind="classify"), "up", everyone.label_space)
    for site in (listed, given):
        same(site.client, everyone.by_name["up"])
        assert site.label_space == everyone.label_space


def test_a_site_is_warned_of_its_own_rows(at_site):
    """As `train` warns, and of these rows alone."""
    config = at_site(prompt__cutoff=8)
    site = load_site(config, "up")
    with pytest.warns(DataWarning) as caught:
        assert warn_of_site(config, site) == [str(one.message) for one in caught]
    assert {str(one.message).partition(":")[0] for one in caught} == {"task up, train"}


def test_a_file_per_client(tiny_base, rows, tmp_path):
    """The folder at a site has the site's own file."""
    tasks = [{"name": "words", "train": str(tmp_path / "all"), "max_new_tokens": 3}]
    settings = {"tasks": tasks, "partition": {"by": "file"}}
    for folder, names in (("all", TASKS), ("own", ["up"])):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(rows / f"{name}.jsonl", tmp_path / folder)
    everyone = load_clients(federated_config(tiny_base, rows, tmp_path / "run", **settings))
    tasks[0]["train"] = str(tmp_path / "own")
    config = federated_config(tiny_base, rows, tmp_path / "run", **settings)
    same(load_site(config, "up").client, everyone.by_name["up"])
    with pytest.raises(ConfigError, match="has no file for client 'rev'"):
        load_site(config, "rev")
    for folder in ("all", "own"):  # test rows of all clients, as a public test set has them
        tasks[0] |= {"train": str(tmp_path / folder), "test": str(tmp_path / "all")}
        config = federated_config(tiny_base, rows, tmp_path / "run", **settings)
        everyone = load_clients(config) if folder == "all" else everyone
    same(load_site(config, "up").client, everyone.by_name["up"])


def test_a_division_of_one_data_set_is_a_simulation(make_config, rows):
    tasks = [{"name": "up", "train": str(rows / "up.jsonl"), "max_new_tokens": 3}]
    config = make_config(partition={"clients": 2}, tasks=tasks)
    with pytest.raises(
        ConfigError, match="iid divides one dataset among clients, which only a simulation can"
    ):
        load_site(config, "client-1")


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "classify"},
        {"kind": "classify", "options": ["yes", "yes"]},
        {"kind": "classify", "options": LABELS, "prompt__packing": True},
        {"tasks": [{"name": "up", "train": "up", "max_new_tokens": 3}], "partition": {"clients": 2}},
        {
            "tasks": [{"name": "up", "train": "up", "max_new_tokens": 3}],
            "partition": {"by": "file"},
            "ranks": [2],
        },
    ],
    ids=["options", "twice", "packing", "iid", "ranks"],
)
def test_a_server_without_rows_rejects_what_every_site_would(at_site, settings):
    """With the same message, so that nobody waits for sites that cannot join."""
    config = at_site(**settings)
    with pytest.raises((ConfigError, DataError)) as at_the_site:
        load_site(config, "up")
    with pytest.raises(type(at_the_site.value)) as at_the_server:
        check_for_sites(without_files(config))
    assert str(at_the_server.value) == str(at_the_site.value)


def test_a_server_without_rows_accepts_what_a_site_can_load(at_site):
    check_for_sites(without_files(at_site()))
    check_for_sites(without_files(at_site(LABELS, kind="classify")))


def test_a_server_without_rows_rejects_a_single_label(at_site):
    with pytest.raises(DataError, match="needs at least two labels"):
        check_for_sites(without_files(at_site(["yes"], kind="classify")))


def without_files(config):
    """The recipe with files that are nowhere on this machine."""
    elsewhere = DataSource(source="/nowhere/rows.jsonl")
    tasks = [task.model_copy(update={"train": elsewhere}) for task in config.tasks]
    return config.model_copy(update={"tasks": tasks})

"""`site status`: the last run as it really ended, and connections as the SuperLink knows them."""

import json
import os
import subprocess
import sys

import pytest

from braidlora.cli import main
from braidlora.config import dump_config
from braidlora.errors import ConfigError
from braidlora.federated.flower import site_status as module
from braidlora.federated.flower.control import connected_sites
from braidlora.federated.flower.last_run import last_run
from braidlora.federated.flower.names import plain_key
from braidlora.federated.flower.settings import read_server
from braidlora.federated.flower.site_status import format_status, site_status
from braidlora.federated.flower.start import federate_at_sites, read_status
from braidlora.federated.flower.status import StatusFile

SITES = ("north", "south")


@pytest.fixture(autouse=True)
def _flower(monkeypatch):
    from braidlora.federated.flower import environment

    monkeypatch.setattr(environment, "version", lambda name: "1.42.0")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A server's folder with two sites, `superlink(...)` of which says which are online; None: it is down."""
    pytest.importorskip("cryptography", reason="needs cryptography, which comes with Flower")
    server = tmp_path / "server"
    assert main(["site", "init", str(server), "--server", "--port", "1"]) == 0
    for name in SITES:
        assert main(["site", "init", str(tmp_path / name), "--name", name, "--superlink", "127.0.0.1:1"]) == 0
        assert main(["site", "add", str(server), name, str(tmp_path / name / "node.pub")]) == 0
    return server


@pytest.fixture
def superlink(folder, monkeypatch):
    def answers(*online):
        monkeypatch.setattr(module, "is_up", lambda *_: True)
        monkeypatch.setattr(module, "nodes_now", lambda folder, settings: nodes(settings, online))

    return answers


def nodes(settings, online):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    pem = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return [
        {
            "status": "online" if site in online else "offline",
            "public_key": load_ssh_public_key(plain_key(key)).public_bytes(*pem).decode(),
        }
        for site, key in settings.sites.items()
    ]


def job(folder, name="20260101-000000-aa", output=None, started_by=None, **result):
    """Write a job, with its result if there is one."""
    jobs = folder / "jobs"
    jobs.mkdir(exist_ok=True)
    output = output or folder / "run"
    started_by = started_by or os.getpid()
    (jobs / f"{name}.json").write_text(json.dumps({"output": str(output), "started_by": started_by}))
    if result:
        (jobs / f"{name}.result.json").write_text(json.dumps(result))
    return f"{name}.json"


def rounds(folder, count):
    (folder / "run").mkdir(exist_ok=True)
    client = {"loss": 1.0, "up": 10, "down": 20}
    lines = [
        {"round": number, "counted": True, "clients": dict.fromkeys(SITES, client)}
        for number in range(1, count + 1)
    ]
    (folder / "run" / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def written(folder, name, pid=None):
    """The status file as a server app leaves it in a round."""
    status = StatusFile(folder / "status.json", folder / "run", name, SITES)
    status.connected(SITES)
    status.phase("round 3: training: 2 of 2 sites answered", 3)
    status.asked("north")
    if pid is not None:
        value = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**value, "pid": pid}))


def now(folder):
    return format_status(site_status(folder)).partition("Now        ")[2].partition("\n")[0]


def test_before_any_run_connections_are_the_superlinks(folder, superlink):
    superlink("south")
    found = site_status(folder)
    assert {name: one["connected"] for name, one in found["sites"].items()} == {"north": False, "south": True}
    assert found["run"] == {
        "active": False, "state": "none", "text": "no run has been started", "error": None,
    }  # fmt: skip
    assert found["nodes_online"] == 1
    assert "running; 1 SuperNode online" in format_status(found)


def test_without_a_superlink_nothing_is_known_of_connections(folder):
    """A real look: nobody listens on port 1."""
    written(folder, job(folder))
    found = site_status(folder)
    assert not found["superlink"]
    assert [one["connected"] for one in found["sites"].values()] == [None, None]
    assert "not running\n" in format_status(found)
    assert "unknown" in format_status(found)


def test_a_run_that_goes_on(folder, superlink):
    superlink(*SITES)
    rounds(folder, 2)
    written(folder, job(folder))
    found = site_status(folder)
    assert found["run"]["active"]
    assert found["phase"] == now(folder) == "round 3: training: 2 of 2 sites answered"
    assert "awaited since" in format_status(found)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"exit_code": 0, "error": ""}, "finished: 2 rounds"),
        ({"exit_code": 6, "error": "x", "stopped": True},
         "was stopped after round 2; --resume auto continues it"),
        ({}, "was stopped after round 2; --resume auto continues it"),
        ({"exit_code": 4, "error": "disk full.\nmore"},
         "failed: disk full."),
    ],
    ids=["finished", "stopped", "killed", "failed"],
)  # fmt: skip
def test_a_run_that_has_ended(folder, superlink, result, expected):
    """Its process is gone; the status file is what it had written last."""
    superlink("south")
    rounds(folder, 2)
    written(folder, job(folder, **result), pid=a_dead_process())
    found = site_status(folder)
    assert found["phase"] == now(folder) == f"no run active; the last run {expected}"
    assert not found["run"]["active"]
    assert found["sites"]["north"]["waiting_since"] is None
    assert found["sites"]["north"]["connected"] is False, "it was connected when the run ended"
    assert "awaited" not in format_status(found)
    assert "3 of 3" not in format_status(found)


def test_a_number_that_another_process_has_now(folder):
    written(folder, job(folder))
    os.utime(folder / "status.json", (1_000_000_000, 1_000_000_000))  # before this process began
    assert last_run(folder, read_status(folder)).state == "stopped"


def test_the_newest_job_counts(folder, superlink):
    superlink(*SITES)
    rounds(folder, 1)
    first = job(folder, exit_code=0, error="")
    written(folder, first, pid=a_dead_process())
    assert now(folder).endswith("finished: 1 round")
    job(folder, "20260101-000001-bb", folder / "other")
    found = site_status(folder)
    assert found["run"]["state"] == "starting"
    assert found["output"] == str(folder / "other")
    assert found["rounds"] == 0
    job(folder, "20260101-000002-cc", started_by=a_dead_process())
    assert site_status(folder)["run"]["state"] == "stopped"


def test_without_keys_a_site_is_known_by_the_server_app_alone(tmp_path, monkeypatch):
    folder = tmp_path / "open"
    assert main(["site", "init", str(folder), "--server", "--insecure"]) == 0
    monkeypatch.setattr(module, "is_up", lambda *_: True)
    monkeypatch.setattr(module, "nodes_now", lambda *_: [{"status": "online", "public_key": "x"}])
    assert connected_sites(read_server(folder), []) == {}
    written(folder, job(folder))
    assert [one["connected"] for one in site_status(folder)["sites"].values()] == [True, True]
    written(folder, job(folder), pid=a_dead_process())
    assert [one["connected"] for one in site_status(folder)["sites"].values()] == [None, None]


class TestFederate:
    @pytest.fixture
    def server(self, tmp_path):
        assert main(["site", "init", str(tmp_path / "open"), "--server", "--insecure", "--port", "1"]) == 0
        return tmp_path / "open"

    def test_a_superlink_that_is_down(self, server, make_config, tmp_path, capsys):
        folder = server
        (tmp_path / "recipe.yaml").write_text(dump_config(make_config()))
        words = ["federate", str(tmp_path / "recipe.yaml"), "--engine", "flower", "--site", str(folder)]
        assert main(words) == 6
        said = capsys.readouterr().err
        assert (
            f"the SuperLink at 127.0.0.1:1 does not answer. Start it with: braidlora site serve {folder}"
            in said
        )
        assert not (folder / "jobs").exists()

    def test_a_recipe_that_no_site_can_load(self, server, make_config):
        with pytest.raises(
            ConfigError, match=r"tasks\.\w+\.options: missing .*A site reads only its own rows"
        ):
            federate_at_sites(make_config(kind="classify"), server)

    def test_clients_without_a_key(self, folder, make_config):
        with pytest.raises(ConfigError, match="no key for len, rev, up"):
            federate_at_sites(make_config(), folder)

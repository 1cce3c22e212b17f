"""A site with `processes: 2`: its worker and a second process train together, on CPUs."""

import os
import signal
import threading
import time

import psutil
import pytest
import yaml
from safetensors.torch import load

from braidlora.config import dump_config
from braidlora.errors import ConfigError, FederationError
from braidlora.federated.flower import followers, programs
from braidlora.federated.flower.join import _environment, _start_worker
from braidlora.federated.flower.settings import read_site
from braidlora.federated.flower.worker import KEY_VARIABLE, ask_worker


@pytest.fixture
def rows(even_rows):
    return even_rows


class Site:
    """A site's folder, and its worker as `site join` starts it. It answers in place of an answerer."""

    def __init__(self, folder, config, name, **settings):
        self.folder, self.private = folder, folder / "private"
        self.private.mkdir(parents=True, mode=0o700)
        (folder / "recipe.yaml").write_text(dump_config(config))
        site = {
            "name": name,
            "server": "127.0.0.1:9092",
            "ca": None,
            "key": None,
            "device": "cpu",
            **settings,
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        self.env = _environment(folder, read_site(folder), self.private, accept_fresh=False)
        os.environ[KEY_VARIABLE] = self.env[KEY_VARIABLE]
        self.worker = None
        self.start()

    def start(self):
        self.worker = _start_worker(self.folder, self.env)

    def answer(self, name, envelope):
        return ask_worker(str(self.private / "worker"), envelope)

    def follower(self):
        [found] = programs._descendants(self.worker.pid)
        return found[0]

    def log(self):
        return (self.folder / "site.log").read_text()

    def close(self):
        programs.stop(self.worker)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """`site(config, name, processes=2)`."""
    made = []
    monkeypatch.setenv(KEY_VARIABLE, "")

    def make(config, name, **settings):
        made.append(Site(tmp_path / f"folder-{len(made)}", config, name, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def shared(run, round=2):
    return (run / "rounds" / f"round-{round}" / "shared.safetensors").read_bytes()


def ended(process, within=20.0):
    end = time.monotonic() + within
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    return process.poll()


def test_a_round_over_two_processes_and_a_lost_one(federation, make_config, site):
    """The result is that of one process with twice the batch; without its second process, the worker ends."""
    settings = {"optimizer_state": "keep", "adapter__lora_dropout": 0.0, "training__threads": 1}
    one = federation(make_config("one", **settings))
    expected = load(shared(one.run()))
    several = federation(make_config("several", **settings))
    several.folder /= "several"
    for name in list(several.post.answerers):
        several.post.answerers[name] = several.site(name)
    rev = site(several.config, "rev", processes=2, batch_size=4)
    several.post.answerers["rev"] = rev
    found = load(shared(several.run()))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 2e-5 * tensor.abs().max(), name
    states = {path.name for path in (rev.folder / "federations").glob("*/state/*")}
    assert states == {"round-1", "pending-2"}, "one process writes"

    for pid in (rev.worker.pid, rev.follower()):
        open_ports = [one.laddr for one in psutil.Process(pid).net_connections() if one.status == "LISTEN"]
        assert {one.ip for one in open_ports} == {"127.0.0.1"}, "other machines cannot reach it"

    os.kill(rev.follower(), signal.SIGKILL)
    assert ended(rev.worker) == 4
    assert "process 1 ended with code -9" in rev.log()


@pytest.mark.slow
def test_a_process_lost_in_training_costs_a_restart(federation, make_config, site):
    """As `site join` does, the worker is started again; the message is repeated, and the round has the same bytes."""
    long = {"training__threads": 1, "local": {"steps": 150}, "rounds": 1}
    runs = []
    for fault in (False, True):
        made = federation(make_config(f"run-{fault}", **long))
        made.folder /= f"sites-{fault}"
        for name in list(made.post.answerers):
            made.post.answerers[name] = made.site(name)
        rev = site(made.config, "rev", processes=2)
        made.post.answerers = {"rev": rev} | made.post.answerers
        made.post.answerers["rev"] = rev

        if not fault:
            runs.append(made.run())
            continue
        thread = threading.Thread(target=lambda made=made: runs.append(made.run()))
        thread.start()
        while "begin: answered" not in rev.log():
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(rev.follower(), signal.SIGKILL)
        assert ended(rev.worker) == 4
        assert "job" not in rev.log(), "it was killed in training"
        rev.start()
        thread.join(120)
        assert "job: answered" in rev.log()
    assert shared(runs[0], 1) == shared(runs[1], 1)


def test_more_processes_than_gpus(tmp_path, monkeypatch):
    settings = {"name": "rev", "server": "127.0.0.1:1", "ca": None, "key": None, "processes": 4}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"site\.yaml: processes is 4, but this machine has 2 GPUs; set processes: 2"
    ):
        followers.check_devices(tmp_path, read_site(tmp_path))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**settings, "device": "cuda:1"}))
    with pytest.raises(ConfigError, match="processes: 4 use one GPU each, but device cuda:1 is one GPU"):
        read_site(tmp_path)


def test_a_base_model_that_one_process_cannot_load(make_config, site, monkeypatch, tmp_path):
    """The site says so and ends, instead of starting its worker again and again."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import braidlora.federated.site.host as host\n"
        "    def full(*arguments):\n"
        "        raise MemoryError('GPU 1 is full')\n"
        "    host.load_base = full\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(FederationError, match="process 1 failed: MemoryError: GPU 1 is full"):
        site(make_config(training__threads=1), "rev", processes=2)

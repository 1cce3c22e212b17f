"""The YAML files of a deployment, and the folders that `site init` and `add` make."""

import stat

import pytest
import yaml

from braidlora.cli import main
from braidlora.errors import ConfigError
from braidlora.federated.flower.settings import (
    ServerSettings,
    SiteSettings,
    is_loopback,
    read_server,
)
from braidlora.federated.flower.site_recipe import site_config


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("federation", False)],
)  # fmt: skip
def test_what_the_loopback_is(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"host": "0.0.0.0", "certificates": None, "node_auth": False},
            "needs `certificates` and `node_auth: true`",
        ),
        ({"host": "10.0.0.1", "node_auth": False}, "needs `certificates` and `node_auth: true`"),
        ({"host": "127.0.0.1", "certificates": None}, "needs `certificates`"),
        ({"deadline": 0}, "greater than 0"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_a_server_beyond_the_loopback_needs_tls_and_keys(settings, expected):
    with pytest.raises(ValueError, match=expected):
        ServerSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"server": "example.org:9092", "ca": None, "key": None}, "needs `ca` and `key`"),
        ({"server": "127.0.0.1:9092", "ca": None}, "go together"),
        ({"server": "127.0.0.1:9092", "device": "gpu"}, "should match pattern"),
    ],
)
def test_a_site_of_another_machine_needs_tls_and_a_key(settings, expected):
    with pytest.raises(ValueError, match=expected):
        SiteSettings.model_validate({"name": "north", **settings})


def test_a_sites_places_and_ways_to_compute(tmp_path, tiny_base, rows):
    recipe = {
        "model": {"path": "/not/here"}, "adapter": {"r": 4, "target_modules": ["q_proj"]},
        "tasks": [{"name": name, "train": f"/not/here/{name}.jsonl"} for name in ("a", "b")],
        "federation": {"rounds": 1, "rule": "fed-alora-het",
                       "clients": [{"name": "north", "tasks": ["a"]}, {"name": "south", "tasks": ["b"]}]},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rows.jsonl").write_text("{}")
    settings = SiteSettings(
        name="north", server="127.0.0.1:1", data={"a": {"train": "rows.jsonl", "test": "generated:sum"}},
        model=str(tiny_base), batch_size=3, rank=2, dtype="bfloat16", threads=1,
    )  # fmt: skip
    config = site_config(tmp_path, settings)
    task = config.tasks[0]
    assert (task.train.source, task.test.source) == (str(tmp_path / "rows.jsonl"), "generated:sum")
    assert config.model.path == str(tiny_base)
    assert config.training.batch_size == 3
    assert [client.rank for client in config.clients()] == [2, 4]
    with pytest.raises(
        ConfigError, match=r"name: 'west' is not a client of the recipe; they are north, south"
    ):
        site_config(tmp_path, settings.model_copy(update={"name": "west", "rank": None}))


class TestFolders:
    """`site init` and `site add`; keys need the package cryptography, which comes with Flower."""

    @pytest.fixture(autouse=True)
    def _flower(self):
        pytest.importorskip("flwr")
        pytest.importorskip("cryptography")

    def run(self, *words, code=0):
        assert main(["site", *map(str, words)]) == code

    def test_keys_are_private_from_the_first_byte_on_and_never_overwritten(self, tmp_path, capsys):
        self.run("init", tmp_path / "server", "--server")
        keys = sorted((tmp_path / "server" / "tls").glob("*.key"))
        assert [path.name for path in keys] == ["ca.key", "server.key"]
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in keys)
        before = [path.read_bytes() for path in keys]
        self.run("init", tmp_path / "server", "--server", code=2)
        assert [path.read_bytes() for path in keys] == before
        keys[1].chmod(0o644)
        with pytest.raises(ConfigError, match=r"mode 0644 lets others read this private key; run: chmod 600"):
            read_server(tmp_path / "server")

    def test_a_name_has_one_key_and_a_key_one_name(self, tmp_path, capsys):
        self.run("init", tmp_path / "server", "--server")
        for name in ("north", "south"):
            self.run("init", tmp_path / name, "--name", name, "--superlink", "127.0.0.1:9092")
        server, north, south = (tmp_path / name for name in ("server", "north", "south"))
        self.run("add", server, "north", north / "node.pub")
        self.run("add", server, "north", north / "node.pub")
        self.run("add", server, "north", south / "node.pub", code=2)
        assert "north has another key" in capsys.readouterr().err
        self.run("add", server, "south", north / "node.pub", code=2)
        assert "this is the key of north" in capsys.readouterr().err
        self.run("add", server, "south", north / "node.key", code=2)
        self.run("add", server, "../x", south / "node.pub", code=2)
        assert list(read_server(server).sites) == ["north"]

    def test_insecure_only_on_the_loopback(self, tmp_path, capsys):
        self.run("init", tmp_path / "a", "--server", "--insecure", "--host", "0.0.0.0", code=2)
        assert "without TLS and node authentication" in capsys.readouterr().err
        self.run("init", tmp_path / "b", "--server", "--insecure")
        assert read_server(tmp_path / "b").certificates is None

    def test_options_of_the_other_role(self, tmp_path, capsys):
        self.run("init", tmp_path / "a", "--server", "--superlink", "x:1", code=2)
        self.run("init", tmp_path / "a", "--name", "x", "--host", "0.0.0.0", code=2)
        self.run("init", tmp_path / "a", "--name", "x", code=2)
        self.run("init", tmp_path / "a", "--name", "x", "--superlink", "nowhere", code=2)
        assert not (tmp_path / "a").exists()

    def test_a_private_key_in_place_of_the_certificate(self, tmp_path, capsys):
        self.run("init", tmp_path / "server", "--server")
        ca = tmp_path / "server" / "tls" / "ca.key"
        self.run("init", tmp_path / "n", "--name", "n", "--superlink", "a:1", "--ca", ca, code=2)
        assert "this is a private key" in capsys.readouterr().err


def test_without_flower_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    from importlib.metadata import PackageNotFoundError

    from braidlora.federated.flower import environment

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    assert main(["site", "init", str(tmp_path / "x"), "--server"]) == 2
    assert "pip install 'braidlora[fed]'" in capsys.readouterr().err
    monkeypatch.setattr(environment, "version", lambda name: "1.39.1")
    assert main(["site", "serve", str(tmp_path / "x")]) == 2
    assert "flwr 1.39.1 is too old; expected 1.41 or newer" in capsys.readouterr().err


def test_options_of_another_engine(capsys):
    assert main(["federate", "fed_demo", "--client-cpus", "1"]) == 2
    assert "--client-cpus applies to --engine flower-sim; the engine is local" in capsys.readouterr().err
    assert main(["federate", "fed_demo", "--engine", "flower"]) == 2
    assert "needs --site DIR" in capsys.readouterr().err

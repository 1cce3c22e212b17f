"""What an operator of a deployment does wrong: wrong files, paths, addresses and ports, found before anything loads."""

import os
import socket
import threading
import time

import pytest
import yaml

from braidlora.cli import main
from braidlora.errors import ConfigError, DataError
from braidlora.federated.flower.addresses import address_problem, host_problem
from braidlora.federated.flower.claim import check_port, claim
from braidlora.federated.flower.join import NODE_LOG, _why_ended
from braidlora.federated.flower.settings import ServerSettings, SiteSettings, read_site
from braidlora.federated.flower.site_recipe import site_config
from braidlora.federated.site.load import load_site
from braidlora.runs import LOCK

SITE = ("init", "n", "--name", "sum", "--superlink", "a.org:1")
HEAD = {"name": "north", "server": "127.0.0.1:9092", "ca": None, "key": None}


@pytest.mark.parametrize(
    "text", ["a:1", "localhost:9092", "10.0.0.1:65535", "[2001:db8::1]:9092", "my_host.example.org:1"]
)
def test_addresses(text):
    assert address_problem(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("https://localhost:9092", "without https://"), ("localhost", "expected HOST:PORT"),
     (":9092", "expected HOST:PORT"),
     ("a:0", "expected HOST:PORT"), ("a:70000", "expected HOST:PORT"), ("a:9092/x", "expected HOST:PORT"),
     ("2001:db8::1:9092", "in brackets"), ("a b:1", "expected HOST:PORT"), ("10.0.0.300:1", "expected HOST:PORT")],
)  # fmt: skip
def test_what_is_no_address(text, expected):
    assert expected in address_problem(text)
    with pytest.raises(ValueError, match=r"server .*: expected HOST:PORT"):
        SiteSettings.model_validate({**HEAD, "server": text})


@pytest.mark.parametrize(
    "text", ["localhost", "a.example.org", "*.example.org", "::1", "0.0.0.0", "10.0.0.1"]
)
def test_hosts(text):
    assert host_problem(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("http://a.org", "without http://"), ("a.org:9092", "without a port"), ("a.org/", "expected a host name"),
     ("", "expected a host name"), ("10.0.0.300", "expected a host name"), ("[::1]", "expected a host name")],
)  # fmt: skip
def test_what_is_no_host(text, expected):
    assert expected in host_problem(text)
    with pytest.raises(ValueError, match="host"):
        ServerSettings.model_validate({"host": text})


class TestFiles:
    """Certificates and keys; they need the package cryptography, which comes with Flower."""

    @pytest.fixture(autouse=True)
    def _flower(self):
        pytest.importorskip("flwr")
        pytest.importorskip("cryptography")

    @pytest.fixture
    def run(self, tmp_path, capsys, monkeypatch):
        """Runs `site` with these words, and gives its error message or what it says."""
        monkeypatch.chdir(tmp_path)

        def run(*words, code=0):
            assert main(["site", *map(str, words)]) == code
            out, err = capsys.readouterr()
            return err if code else out

        return run

    @pytest.fixture
    def folders(self, run):
        """A server's folder `fed` and a site's folder `n`, with `ca.crt`."""
        run("init", "fed", "--server")
        run(*SITE, "--recipe", "fed_demo", "--ca", "fed/tls/ca.crt")

    @pytest.mark.parametrize(
        ("file", "expected"),
        [
            (
                "n/node.key",
                "send node.pub. This is a private key, which must not leave its site: make a new one",
            ),
            ("fed/tls/ca.key", "which must not leave its site"),
            ("fed/tls/ca.crt", "n/a: not a node's public key; send node.pub. This is a certificate."),
            (
                "fed/server.yaml",
                "not a node's public key; send node.pub (expected a line that starts with ecdsa-",
            ),
            ("rsa", "not a node's public key; send node.pub (expected a line that starts with ecdsa-"),
            ("bytes", "not a node's public key; send node.pub. It is not a text file."),
            ("empty", "empty: an empty file."),
            ("fed", "fed: a folder; expected a file."),
            ("nope", "nope: no such file."),
        ],
    )
    def test_add_of_a_file_that_is_no_public_key(self, run, folders, tmp_path, file, expected):
        (tmp_path / "rsa").write_text("ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== me@here\n")
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "empty").write_bytes(b"\n")
        before = (tmp_path / "fed" / "server.yaml").read_bytes()
        assert expected.replace("n/a", file) in run("add", "fed", "sum", file, code=2)
        assert (tmp_path / "fed" / "server.yaml").read_bytes() == before

    @pytest.mark.parametrize(
        ("file", "expected"),
        [("nope.crt", "nope.crt: no such file."), ("fed", "fed: a folder"), ("empty", "an empty file"),
         ("n/node.pub", "not a certificate in PEM format"), ("fed/tls/ca.key", "this is a private key")],
    )  # fmt: skip
    def test_init_with_a_file_that_is_no_certificate(self, run, folders, tmp_path, file, expected):
        (tmp_path / "empty").write_bytes(b"")
        words = ("init", "x", "--name", "x", "--superlink", "a.org:1", "--ca", file)
        assert expected in run(*words, code=2)
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (
                ("--server", "--reached-as", "http://a.org"),
                "--reached-as http://a.org: expected a host name or an IP",
            ),
            (("--server", "--reached-as", "a.org:9092"), "without a port"),
            (
                ("--server", "--host", "a.org:9092"),
                "--host a.org:9092: expected a host name or an IP address",
            ),
            (("--server", "--port", "70000"), "--port 70000: expected a port from 1 to 65535"),
            (("--name", "x", "--superlink", "https://localhost:9092"), "expected HOST:PORT"),
            (("--name", "x", "--superlink", "a.org:1", "--port", "0"), "--port 0: expected a port"),
            (
                ("--name", "x", "--superlink", "a.org:1", "--insecure"),
                "--insecure: a.org:1 is another machine",
            ),
            (
                ("--name", "x", "--superlink", "[::1]:1", "--insecure", "--ca", "c"),
                "--ca: has no effect with --insecure",
            ),
            (("--name", "x", "--superlink", "a.org:1", "--recipe", "nope.yaml"), "nope.yaml: no such file"),
        ],
    )
    def test_init_with_other_options_that_cannot_be_right(self, run, tmp_path, words, expected):
        assert expected in run("init", "x", *words, code=2)
        assert not (tmp_path / "x").exists()

    def test_init_where_a_file_is(self, run, folders):
        for folder in ("fed/server.yaml", "fed/server.yaml/below"):
            assert "a file is in the way" in run("init", folder, "--server", code=2)

    def test_init_says_what_is_still_needed(self, run):
        words = ("--name", "sum", "--superlink", "127.0.0.1:1")
        assert (
            "Copy the server's tls/ca.crt to a/ca.crt. Copy the federation's recipe to a/recipe.yaml."
            in run("init", "a", *words)
        )
        assert "Copy" not in run("init", "b", *words, "--insecure", "--recipe", "fed_demo")
        assert "a/ca.crt: no such file; copy the server's tls/ca.crt there." in run("join", "a", code=2)

    def test_init_without_tls_names_no_files_of_tls(self, run):
        server = run("init", "s", "--server", "--insecure")
        site = run("init", "n", "--name", "sum", "--superlink", "127.0.0.1:1", "--insecure")
        assert "ca.crt" not in server + site
        assert "node.pub" not in (server + site).lower()

    def test_the_files_of_an_earlier_folder_may_stay(self, run, folders, tmp_path):
        (tmp_path / "n" / "site.yaml").unlink()
        for key in ("node.key", "node.pub"):
            (tmp_path / "n" / key).unlink()
        run(*SITE, "--recipe", "n/recipe.yaml", "--ca", "n/ca.crt")

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("ca.crt", None, "ca.crt: no such file"),
            ("ca.crt", "certificate", "ca.crt: not a certificate in PEM format"),
            ("server.crt", None, "server.crt: no such file"),
            ("server.crt", "", "server.crt: an empty file"),
            ("server.crt", "-----BEGIN CERTIFICATE-----\n", "not a certificate and its private key"),
            ("server.key", None, "server.key: the private key cannot be read: No such file"),
            ("server.key", "key", "server.key: not a private key in PEM format"),
        ],
    )
    def test_serve_with_files_that_cannot_be_used(self, run, folders, tmp_path, name, content, expected):
        path = tmp_path / "fed" / "tls" / name
        path.unlink()
        if content is not None:
            path.write_text(content)
        assert expected in run("serve", "fed", code=2)
        assert not (tmp_path / "fed" / "superlink.log").exists()

    def test_serve_with_the_key_of_another_certificate(self, run, folders, tmp_path):
        tls = tmp_path / "fed" / "tls"
        (tls / "server.crt").write_bytes((tls / "ca.crt").read_bytes())
        assert "server.key: not the private key of" in run("serve", "fed", code=2)

    def test_a_key_in_the_settings_that_is_none(self, run, folders, tmp_path):
        path = tmp_path / "fed" / "server.yaml"
        path.write_text(path.read_text().replace("sites: {}", "sites: {north: '-----BEGIN'}"))
        said = run("serve", "fed", code=2)
        assert "1 problem in server.yaml:" in said
        assert "sites.north: not a public key" in said

    def test_a_port_in_use(self, run, folders, tmp_path):
        """Found at once: nothing has been loaded, and no program has been started."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            run("init", "b", "--name", "sum", "--superlink", "a.org:1", "--recipe", "fed_demo",
                "--ca", "fed/tls/ca.crt", "--port", port)  # fmt: skip
            assert f"port {port} is in use; set another `port` in site.yaml." in run("join", "b", code=2)
            assert not (tmp_path / "b" / "site.log").exists()
            run("init", "s", "--server", "--port", port)
            assert f"port {port} is in use; set another `port` in server.yaml" in run("serve", "s", code=2)
            assert not (tmp_path / "s" / "superlink.log").exists()

    def test_twice_in_one_folder(self, run, folders, tmp_path):
        for folder, done, verb in (("n", "joined", "join"), ("fed", "served", "serve")):
            with claim(tmp_path / folder / "flower", "127.0.0.1", _free(), "site.yaml", done):
                said = run(verb, folder, code=5)
            assert f"{folder}: {done} already, by process {os.getpid()} on " in said


def _free():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_the_port_of_a_command_that_was_killed_may_be_free_in_a_moment(tmp_path):
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]
    folder = tmp_path / "flower"
    folder.mkdir()
    (folder / LOCK).write_text("{}")  # nobody holds it
    threading.Timer(0.5, other.close).start()
    begin = time.monotonic()
    with claim(folder, "127.0.0.1", port, "site.yaml", "joined"):
        assert time.monotonic() - begin >= 0.4
    assert not (folder / LOCK).exists()
    with socket.create_server(("127.0.0.1", port)):
        begin = time.monotonic()
        with (
            pytest.raises(ConfigError, match="in use"),
            claim(folder, "127.0.0.1", port, "site.yaml", "joined"),
        ):
            raise AssertionError("the port is in use")
        assert time.monotonic() - begin < 5


def test_a_file_in_place_of_flowers_folder(tmp_path):
    (tmp_path / "flower").write_text("")
    with (
        pytest.raises(ConfigError, match="flower: this folder cannot be created: File exists"),
        claim(tmp_path / "flower", "127.0.0.1", _free(), "site.yaml", "joined"),
    ):
        raise AssertionError("there is no folder")


def test_a_host_that_is_not_this_machine():
    with pytest.raises(
        ConfigError, match=r"server\.yaml: host: 192\.0\.2\.1 is not an address of this machine"
    ):
        check_port("192.0.2.1", _free(), "server.yaml")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "IP address mismatch, certificate is not valid for '10.0.0.1'",
            "`braidlora site init NEW-DIR --server --reached",
        ),
        ("Hostname mismatch, certificate is not valid for 'a.org'.", "not issued for the host in `server`"),
        (
            "unable to get local issuer certificate",
            "does not match `ca`: copy the server's tls/ca.crt here again",
        ),
        ("certificate has expired", "has expired"),
    ],
)
def test_a_server_whose_certificate_is_rejected(tmp_path, line, expected):
    """As a SuperNode of flwr 1.42 logs it."""
    start = "INFO : Starting Flower SuperNode\n"
    before = f"{start}certificate has expired\n" if "expired" not in line else ""  # an earlier start
    failed = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
    (tmp_path / NODE_LOG).write_text(f"{before}{start}{failed}: {line} (_ssl.c:1006)\n")
    assert expected in _why_ended(tmp_path, 1)


class TestSitesRows:
    """`data`, `model` and `recipe` of site.yaml."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.delenv("BRAIDLORA_DATA", raising=False)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        site = tmp_path / "site"
        site.mkdir()
        (tmp_path / "notes.csv").write_text(
            "instruction,output\n" + "".join(f"q{n},a{n}\n" for n in range(6))
        )
        return site

    def config(self, folder, *lines, partition=False, **task):
        task = {"name": "notes", "train": "data/notes.csv", **task}
        federation = (
            {"partition": {"by": "file"}}
            if partition
            else {"clients": [{"name": "north", "tasks": ["notes"]}]}
        )
        recipe = {
            "model": {"path": "embedded"}, "adapter": {"r": 4, "target_modules": ["q_proj"]}, "tasks": [task],
            "federation": {"rounds": 1, **federation},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "site.yaml").write_text(yaml.safe_dump(HEAD) + "".join(f"{line}\n" for line in lines))
        return site_config(folder, read_site(folder))

    def said(self, folder, *lines, error=ConfigError, **options):
        with pytest.raises(error) as caught:
            self.config(folder, *lines, **options)
        return str(caught.value)

    def test_a_path_starts_at_the_sites_folder(self, folder):
        assert (
            self.config(folder, "data: {notes: ../notes.csv}")
            .tasks[0]
            .train.source.endswith("site/../notes.csv")
        )

    @pytest.mark.parametrize("lines", ["{notes: ../notes.csv}", "{notes: {train: ../notes.csv}}"])
    def test_the_recipe_chooses_rows_and_the_site_says_how_to_read_them(self, folder, lines):
        train = {"source": "rows.xlsx", "format": "xlsx", "where": {"output": ["a1", "a2", "a3"]}, "limit": 2}
        config = self.config(folder, f"data: {lines}", train=train)
        assert config.tasks[0].train.format is None
        rows = load_site(config, "north").client.tasks[0].train
        assert len(rows) == 2
        assert {row["output"] for row in rows} < {"a1", "a2", "a3"}

    def test_a_file_that_is_not_there(self, folder):
        said = self.said(folder, "# rows", "data: {notes: ../data/note.csv}", error=DataError)
        assert said.startswith(
            f"{folder}/site.yaml:6: data.notes: {folder.parent}/data/note.csv: no such file or folder"
        )
        assert "relative paths start at the site's folder" in said
        assert "elsewhere:" not in said
        assert "BRAIDLORA_DATA" not in said
        said = self.said(folder, "data: {notes: {train: ../notes.csv, test: ../note.csv}}", error=DataError)
        assert f"data.notes.test: {folder.parent}/note.csv: no such" in said
        assert f"Similar names in {folder.parent}: notes.csv" in said

    @pytest.mark.parametrize("partition", [False, True])
    def test_data_that_is_not_set(self, folder, partition):
        said = self.said(folder, "data: {}", error=DataError, partition=partition)
        assert (
            f"{folder}/site.yaml:5: data: the recipe's rows for notes, data/notes.csv, are not here" in said
        )
        assert "set `data` to this site's own: {notes: FILE}" in said

    def test_a_task_that_the_recipe_does_not_have(self, folder):
        said = self.said(folder, "data: {note: ../notes.csv}")
        assert (
            said
            == f"{folder}/site.yaml:5: data.note: the recipe has no task of this name; its tasks are notes."
        )
        assert "data.notes.trian: unknown key; expected {train" in self.said(
            folder, "data: {notes: {trian: a.csv}}"
        )

    def test_test_rows_of_the_recipe_that_are_not_here(self, folder):
        said = self.said(folder, "data: {notes: ../notes.csv}", error=DataError, test="data/notes-test.csv")
        assert "data.notes: the recipe also has test rows, data/notes-test.csv, which are not here" in said
        assert "notes: {train: ../notes.csv, test: FILE}" in said

    def test_problems_name_the_file(self, folder):
        said = self.said(folder, "data: {notes: ../notes.csv}", "precision: bogus")
        assert said.startswith("1 problem in site.yaml and recipe.yaml:")
        assert f"{folder}/site.yaml:6: precision: got 'bogus'" in said
        said = self.said(folder, "data: {notes: ../notes.csv}", mod="x")
        assert said.startswith("1 problem in recipe.yaml:")
        (folder / "site.yaml").write_text(yaml.safe_dump({**HEAD, "surprise": 1}))
        with pytest.raises(
            ConfigError, match=r"^1 problem in site\.yaml:\n.*site\.yaml:5: surprise: unknown key"
        ):
            read_site(folder)

    def test_a_rank_of_a_client_that_the_recipe_does_not_list(self, folder):
        said = self.said(folder, "data: {notes: ../notes.csv}", "rank: 2", partition=True)
        assert "site.yaml:6: rank: the recipe lists no clients with ranks of their own" in said

    @pytest.mark.parametrize("name", ["recipe.yml", ".."])
    def test_a_recipe_that_is_not_there(self, folder, name):
        (folder.parent / "elsewhere" / "recipe.yml").write_text("{}")  # of another command
        said = self.said(folder, f"recipe: {name}")
        assert "site.yaml:5: recipe: " in said
        assert "copy the federation's recipe there" in said

    def test_a_base_model_that_is_not_there(self, folder):
        said = self.said(folder, "data: {notes: ../notes.csv}", "model: ../base")
        assert f"site.yaml:6: model: {folder.parent}/base: no such file or folder" in said

    def test_a_site_with_one_file_of_any_name(self, folder):
        """With `by: file`; in a simulation it is a folder with a file per client."""
        config = self.config(folder, "data: {notes: ../notes.csv}", partition=True)
        client = load_site(config, "north").client
        assert [len(task.train) for task in client.tasks] == [6]
        folders = folder.parent / "all"
        folders.mkdir()
        (folder.parent / "notes.csv").rename(folders / "north.csv")
        config = self.config(folder, "data: {notes: ../all}", partition=True)
        assert load_site(config, "north").client.tasks == client.tasks

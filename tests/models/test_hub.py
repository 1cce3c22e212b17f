"""The hub is asked briefly: its cache, then the hub, in silence."""

import http.server
import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.models.hub import ask_hub
from braidlora.models.tokenizer import load_tokenizer


class _Hub(http.server.BaseHTTPRequestHandler):
    """Has owner/there; knows nothing of owner/gone; owner/gated needs a login."""

    def do_HEAD(self):
        if self.path.startswith("/owner/there/"):
            self.send_response(200)
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "2")
        else:
            gated = self.path.startswith("/owner/gated/")
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The hub at an address of this machine, with an empty cache."""

    def at(address):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        ask_hub.cache_clear()
        huggingface_hub.close_session()

    yield at
    ask_hub.cache_clear()
    huggingface_hub.close_session()


@pytest.fixture
def closed():
    """An address of this machine where nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_what_the_hub_says(online):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        online(f"http://127.0.0.1:{server.server_port}")
        assert ask_hub("owner/there") == "has"
        assert ask_hub("owner/gone") == "lacks"
        assert ask_hub("owner/gated") == "has"  # loading explains how to get access
        assert ask_hub("no name") == "lacks"
    finally:
        server.shutdown()
        server.server_close()


def test_without_a_network_the_answer_comes_at_once_and_in_silence(online, closed, capfd, caplog):
    online(closed)
    start = time.monotonic()
    assert ask_hub("owner/there") == "unreachable"
    assert time.monotonic() - start < 8  # huggingface_hub's own retries take 23 s
    assert capfd.readouterr().err == ""
    assert not caplog.records


def test_what_is_cached_is_there_without_a_network(online, closed, tmp_path):
    online(closed)
    folder = tmp_path / "cache" / "models--owner--there"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "snapshots" / "0" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    assert ask_hub("owner/there") == "has"
    assert ask_hub("owner/there", "other") == "unreachable"


def test_a_base_that_only_the_hub_has_is_refused_with_the_way_out(online, closed):
    online(closed)
    with pytest.raises(
        ConfigError, match=r"owner/there: not in the hub's cache, and the hub cannot be reached\. Con"
    ):
        load_tokenizer(ModelSection(path="owner/there"))

"""What `--url` sends and what it says when a server does not answer as expected, against a small server."""

import http.server
import json
import threading

import pytest

from braidlora.errors import ConfigError
from braidlora.inference.connection import Connection


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.seen.append(dict(self.headers))
        status, body, headers = server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 (the library's names)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.seen = []
        found.answer = (200, json.dumps({"data": [{"id": "alora", "owned_by": "vllm"}]}).encode(), {})
        found.url = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_the_key_comes_from_the_environment(server, monkeypatch):
    Connection(server.url, "alora")
    assert "Authorization" not in server.seen[-1]
    monkeypatch.setenv("BRAIDLORA_API_KEY", "k")
    assert Connection(f"{server.url}/v1/", "alora").is_vllm
    assert server.seen[-1]["Authorization"] == "Bearer k"


def test_a_proxy_does_not_see_requests_to_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    Connection(server.url, "alora")


def test_a_redirect_is_not_followed(server, monkeypatch):
    monkeypatch.setenv("BRAIDLORA_API_KEY", "k")
    server.answer = (302, b"", {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(ConfigError, match=r"redirects to .*/elsewhere; use that address"):
        Connection(server.url, "alora")
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, b"", {}), "requires an API key; set BRAIDLORA_API_KEY"),
        ((500, b"broken", {}), "returned 500: broken"),
        ((200, b"<html>", {}), "no usable answer"),
        ((200, b"[]", {}), "did not return a JSON object"),
        ((200, b'{"data": []}', {}), "has no model 'alora'; it has none"),
        ((200, b'{"data": [{"id": "x"}]}', {}), "it has x"),
    ],
)
def test_what_a_server_may_answer(server, answer, message):
    server.answer = answer
    with pytest.raises(ConfigError, match=message):
        Connection(server.url, "alora")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "file:///etc/passwd", "http://", "http://u:p@x"]
)
def test_what_is_no_url(url):
    with pytest.raises(ConfigError, match="--url: got"):
        Connection(url, "alora")


def test_no_server():
    with pytest.raises(ConfigError, match="Is the server running"):
        Connection("http://127.0.0.1:9", "alora")


def test_a_key_over_plain_http_to_another_machine_is_warned_of(monkeypatch):
    monkeypatch.setenv("BRAIDLORA_API_KEY", "k")
    with pytest.warns(UserWarning, match="unencrypted"), pytest.raises(ConfigError):
        Connection("http://no-such-host.invalid", "alora")


def test_the_commands(command, runs, classifier, server):
    code, _, err = command("predict", runs["alora"], "--task=rising", "--text=1", "--model=x")
    assert (code, "it requires --url" in err) == (2, True)
    code, _, err = command("predict", classifier, "--text=1", "--url", server.url)
    assert (code, "is a classifier, which no server hosts" in err) == (2, True)
    code, _, err = command("generate", runs["lora"], "--prompt=1", "--url", server.url)
    assert (code, "has no model 'lora'; it has alora" in err) == (2, True)

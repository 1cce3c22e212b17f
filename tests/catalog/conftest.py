"""A catalog of a few small files, and a server on the loopback that serves them, well or badly."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from catalog_files import PROBLEMS, ROWS, SOLVED

from braidlora.catalog import _facts, _find


class Server:
    """What the server answers by path, and the paths it was asked for."""

    def __init__(self):
        self.answers: dict[str, tuple[int, bytes, int | None]] = {}
        self.asked: list[str] = []

    def serve(self, path, content, status=200, cut=None):
        """Answer `path`; with `cut` the connection ends after that many bytes."""
        self.answers[path] = (status, content, cut)


@pytest.fixture
def server():
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known.asked.append(self.path)
            status, content, cut = known.answers.get(self.path, (404, b"no such file", None))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut])

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{listening.server_port}/"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield known
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture
def table(server, tmp_path, monkeypatch):
    """The catalog of this test; its files' public addresses are on the server, and the cache is empty."""
    blob = hashlib.sha1(b"blob %d\0" % len(ROWS) + ROWS).hexdigest()
    files = {
        "data/words/train.jsonl": {"path": "words.jsonl", "size": len(ROWS), "sha256": _sha256(ROWS)},
        "data/words/other.jsonl": {"path": "other.jsonl", "git_blob": blob},
        "data/sums/original.json": {"path": "sums.json", "size": len(PROBLEMS), "sha256": _sha256(PROBLEMS)},
    }
    made = {
        "data/sums/train.json": {
            "size": len(SOLVED), "sha256": _sha256(SOLVED), "build": "mawps", "inputs": ["data/sums/original.json"],
        },
        "data/secret.jsonl": {"size": 1, "sha256": _sha256(b"x")},
    }  # fmt: skip
    sets = {
        "words/say": {
            "about": "repeat a number",
            "parts": {
                "train": {"file": "data/words/train.jsonl", "where": {"part": "a"}},
                "test": {"file": "data/words/train.jsonl", "where": {"part": "b"}},
            },
        },
        "words/other": {"about": "by git", "parts": {"train": {"file": "data/words/other.jsonl"}}},
        "sums": {"about": "made", "parts": {"train": {"file": "data/sums/train.json"}}},
        "secret": {"about": "local", "parts": {"train": {"file": "data/secret.jsonl"}}},
    }
    groups = [
        {"url": server.url, "license": "none", "files": files},
        {"url": "", "license": "none", "files": made},
    ]
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps({"sets": sets, "files": groups}), encoding="utf-8")
    monkeypatch.setattr(_facts, "_TABLE", path)
    _facts._table.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in (*_find.OFFLINE_VARIABLES, _find.MIRROR_VARIABLE, "BRAIDLORA_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_find, "_RETRIES", 0)
    yield tmp_path / "cache" / "braidlora"
    _facts._table.cache_clear()


def _sha256(content):
    return hashlib.sha256(content).hexdigest()

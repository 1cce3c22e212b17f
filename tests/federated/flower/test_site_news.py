"""What `site join` says of its connection, from lines as the SuperNode logs them."""

import socket

import pytest

from braidlora.federated.flower.site_news import News

FAILED = "WARNING :   Connection attempt failed, retrying in 0.73 seconds\n"
AGAIN = "INFO :      Connection successful after 40.74 seconds and 9 tries.\n"
ID = "INFO :      SuperNode ID: 4443869985853965582\n"


class Site:
    def __init__(self, path, server):
        self.path, self.said, self.now = path, [], 0.0
        path.write_text("SuperNode ID: of an earlier start\n")
        self.news = News(path, "north", server, self.said.append, clock=lambda: self.now)

    def after(self, seconds, text=""):
        """What is said once these seconds have passed and this text was logged."""
        self.now += seconds
        with self.path.open("a") as file:
            file.write(text)
        before = len(self.said)
        self.news.look()
        return [line.removeprefix("north: ") for line in self.said[before:]]


@pytest.fixture
def closed():
    """An address of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_does_not_answer(tmp_path, closed):
    site = Site(tmp_path / "log", closed)
    assert site.after(3, FAILED) == []
    assert site.after(18) == [f"no answer from {closed} yet (connection refused); retrying"]
    assert site.after(60, FAILED) == [], "once"
    assert site.after(1, AGAIN + ID) == ["connected"]


def test_a_name_that_is_none(tmp_path):
    site = Site(tmp_path / "log", "nowhere.invalid:9092")
    assert site.after(21) == [
        "no answer from nowhere.invalid:9092 yet (the name nowhere.invalid cannot be resolved); retrying"
    ]


def test_a_connection_that_is_lost_and_comes_back(tmp_path, closed):
    site = Site(tmp_path / "log", closed)
    assert site.after(1, ID) == ["connected"]
    assert site.after(100, FAILED) == [], "one attempt is no news"
    assert site.after(2, AGAIN) == []
    assert site.after(9, FAILED) == []
    assert site.after(6, FAILED) == [f"connection to {closed} lost; retrying"]
    assert site.after(60, FAILED) == []
    assert site.after(60, AGAIN) == ["connected again"]
    assert site.after(60) == []
    assert site.after(1, FAILED) == []
    assert site.after(6) == [f"connection to {closed} lost; retrying"], "each time"


def test_messages_and_a_line_in_two_parts(tmp_path, closed):
    site = Site(tmp_path / "log", closed)
    assert site.after(1, ID + "INFO : Receiving: query mess") == ["connected"]
    assert site.after(1, "age\nINFO : Sent successfully\n") == ["received a message", "sent its answer"]

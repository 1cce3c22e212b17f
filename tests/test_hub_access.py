"""Where the hub cannot be reached: its libraries are told so at once, and ask for no file six times."""

import os
import socket
import subprocess
import sys

import pytest

from braidlora import hub_access
from braidlora.errors import ConfigError


@pytest.fixture
def hub(monkeypatch):
    """Answers afresh, with the hub at an address of one's choice."""
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_access.check_hub.cache_clear()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    hub_access.check_hub.cache_clear()


def test_a_server_that_takes_connections_is_the_hub(hub):
    from huggingface_hub import is_offline_mode

    with socket.create_server(("127.0.0.1", 0)) as server:
        hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_access.check_hub()
    assert not is_offline_mode()


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_no_server_puts_the_process_offline(hub, host):
    from huggingface_hub import is_offline_mode

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hub(f"http://{host}:{port}")
    assert not hub_access.check_hub()
    assert is_offline_mode()


def test_offline_mode_asks_nothing(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub_access.check_hub()


def test_a_proxy_is_not_bypassed(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    hub("http://no-such-host.invalid")
    assert hub_access.check_hub()


def test_a_model_that_is_not_here_is_reported_without_retries(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{closed}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    words = ["preview", "demo", "--model.path=nobody/nothing"]
    done = subprocess.run(
        [sys.executable, "-m", "braidlora", *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Retry" not in done.stderr
    assert "nobody/nothing" in done.stderr
    assert "not in the hub's cache, and the hub cannot be reached" in done.stderr
    assert "`hf download nobody/nothing --local-dir FOLDER`" in done.stderr


def test_a_name_of_one_word_is_not_tried_six_times_either(hub, monkeypatch):
    from braidlora.models import presence

    hub("http://no-such-host.invalid")
    presence._on_hub.cache_clear()
    with pytest.raises(ConfigError, match="no model 'gpt2-of-nobody'"):
        presence.refuse_unknown_model("gpt2-of-nobody")
    assert hub_access.check_hub.cache_info().currsize == 1  # asked, before any file

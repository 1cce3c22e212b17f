"""Requests to an OpenAI-compatible server. Imports no torch."""

from __future__ import annotations

import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping
from typing import Any

from braidlora.errors import ConfigError
from braidlora.json_text import loads

KEY = "BRAIDLORA_API_KEY"  # variable with the server's API key
_SECONDS = 600
_MOST_SHOWN = 500  # characters of a server's message


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Connection:
    """One model at one server.

    Args:
        url: of the server, with or without `/v1`.
        model: its name there.

    Attributes:
        is_vllm: whether the server takes token ids and returns log-likelihoods.

    Raises:
        ConfigError: the URL is not one, the server cannot be reached, rejects the key, or has no such model.
    """

    def __init__(self, url: str, model: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(f"--url: got {url!r}; expected http://HOST:PORT or https://HOST:PORT.")
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        self.key = os.environ.get(KEY)
        local = _is_local(parts.hostname)
        if self.key and parts.scheme == "http" and not local:
            warnings.warn(
                f"--url: the API key and all texts go to {url} unencrypted; use https", stacklevel=2
            )
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        known = {str(one.get("id")): one for one in self.request("/v1/models").get("data", [])}
        if model not in known:
            raise ConfigError(
                f"--model: the server at {self.url} has no model {model!r}; it has {', '.join(known) or 'none'}."
            )
        self.is_vllm = known[model].get("owned_by") == "vllm"

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer to a request, POST if there is a body."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                answer = loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._explained(error) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"--url: no usable answer from {self.url}{path}: {reason}. Is the server running? `braidlora serve` "
                "starts one."
            ) from None
        if not isinstance(answer, dict):
            raise ConfigError(f"--url: {self.url}{path} did not return a JSON object.")
        return answer

    def _explained(self, error: urllib.error.HTTPError) -> ConfigError:
        text = error.read(_MOST_SHOWN).decode(errors="replace").strip()
        if error.code in (401, 403):
            given = f"rejects the key in {KEY}" if self.key else f"requires an API key; set {KEY}"
            return ConfigError(f"--url: {self.url} {given}.")
        if 300 <= error.code < 400:
            where = error.headers.get("Location", "elsewhere")
            return ConfigError(f"--url: {self.url} redirects to {where}; use that address.")
        return ConfigError(f"--url: {self.url} returned {error.code}: {text or error.reason}")


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

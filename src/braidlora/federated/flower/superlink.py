"""Flower's SuperLink, of which other machines reach only what sites need.

In Flower 1.41 and later one port serves all of it: the Fleet API for sites, the Control API, through which anyone may
start code on the server, and the Runtime API for the server app. Flower's open edition has no accounts for the Control
API. So requests that do not come from the loopback reach the Fleet API alone.

Run as `python -m braidlora.federated.flower.superlink`, with the arguments of `flower-superlink`.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

FLEET = "/v1/fleet/"


class FleetOnly:
    """ASGI middleware: from elsewhere than the loopback only the Fleet API can be reached.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] == "lifespan" or allowed(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send(
                {"type": "http.response.body", "body": b"Only the Fleet API can be reached from here.\n"}
            )
            return
        await send({"type": "websocket.close", "code": 1008})


def allowed(scope: Any) -> bool:
    """Whether a request may pass: it comes from the loopback, or is for the Fleet API."""
    path = scope.get("path", "")
    if scope["type"] == "http" and path.startswith(FLEET) and "/.." not in path:
        return True
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def main() -> None:
    """Start the SuperLink behind the middleware."""
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    before = getattr(extensions, "get_middleware", None)
    if before is None:
        sys.exit("This version of Flower does not support the check of where requests come from.")
    extensions.get_middleware = lambda: (Middleware(FleetOnly), *before())
    flower_superlink()


if __name__ == "__main__":
    main()

"""Which requests reach the SuperLink from other machines."""

import asyncio

import pytest

from braidlora.federated.flower.superlink import FleetOnly


def answer(path, client, kind="http"):
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "client": client}
    asyncio.run(FleetOnly(app)(scope, None, send))
    return bool(reached), sent


@pytest.mark.parametrize(
    ("path", "client", "passes"),
    [
        ("/v1/fleet/pull-messages", ("10.0.0.7", 5), True),
        ("/v1/control/start-run", ("10.0.0.7", 5), False),
        ("/v1/control/start-run", ("127.0.0.1", 5), True),
        ("/v1/control/start-run", ("::1", 5), True),
        ("/v1/control/start-run", None, False),
        ("/v1/control/start-run", ("unix", 5), False),
        ("/v1/runtime/acquire-task", ("10.0.0.7", 5), False),
        ("/v1/fleet/../control/start-run", ("10.0.0.7", 5), False),
        ("/docs", ("10.0.0.7", 5), False),
        ("/V1/FLEET/x", ("10.0.0.7", 5), False),
        ("//v1/fleet/x", ("10.0.0.7", 5), False),
    ],
)
def test_only_the_fleet_api_is_reached_from_elsewhere(path, client, passes):
    reached, sent = answer(path, client)
    assert reached is passes
    assert passes or sent[0]["status"] == 403


def test_websockets_are_closed():
    reached, sent = answer("/v1/fleet/x", ("10.0.0.7", 5), "websocket")
    assert not reached
    assert sent == [{"type": "websocket.close", "code": 1008}]

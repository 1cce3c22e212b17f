"""At a site in place of Flower's `flwr-clientapp`: runs this package's client app, whatever app the server has sent.

Flower's own program unpacks the app that the server sends with a run, and imports it. So whoever controls the server
could run any code at every site. Here only messages are taken from the server.
"""

from __future__ import annotations

import os
import sys

from braidlora.federated.flower.worker import NAME_VARIABLE, SOCKET_VARIABLE, ask_worker


def main() -> None:
    """Answer one message."""
    from flwr.app import Context
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as program

    from braidlora.federated.flower.client_app import make_client_app

    name, socket = os.environ[NAME_VARIABLE], os.environ[SOCKET_VARIABLE]

    def locate(context: Context):  # type: ignore[no-untyped-def]
        return name, lambda _, envelope: ask_worker(socket, envelope)

    app = make_client_app(locate)
    # What Flower would use to unpack and import the server's app.
    for replaced in ("install_from_fab", "get_load_client_app_fn"):
        if not hasattr(program, replaced):
            sys.exit(f"This version of Flower loads apps differently ({replaced}); nothing was run.")
    program.install_from_fab = lambda *_, **__: None
    program.get_load_client_app_fn = lambda *_, **__: lambda *_: app
    flwr_clientapp()


if __name__ == "__main__":
    main()

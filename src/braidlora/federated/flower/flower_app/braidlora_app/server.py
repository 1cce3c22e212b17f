"""The server's side."""

from braidlora.federated.flower.app import server_app

app = server_app()

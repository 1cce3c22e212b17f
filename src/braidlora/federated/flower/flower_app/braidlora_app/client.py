"""The client's side."""

from braidlora.federated.flower.app import client_app

app = client_app()

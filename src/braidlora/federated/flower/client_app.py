"""Flower's ClientApp: gives each message to the answerer of this place, and its answer back."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.names import WHO

# The client that a node is, and what answers for it, given Flower's context.
Locate = Callable[[Context], tuple[str, Callable[[str, Envelope], Envelope]]]


def make_client_app(locate: Locate) -> ClientApp:
    """A ClientApp whose messages are answered by what `locate` finds."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        # Flower would send the text of an exception to the server.
        kind = "unknown"
        try:
            envelope = Envelope.from_record(message.content)
            kind = envelope.kind
            name, reply = locate(context)
            given = Envelope(WHO, {"client": name}) if kind == WHO else reply(name, envelope)
        except FederationError as error:
            given = _failed(kind, error, "invalid")
        except Exception as error:
            given = _failed(kind, error, "internal")
        return Message(given.to_record(), reply_to=message)

    app.train()(answer)
    app.query()(answer)
    return app


def _failed(kind: str, error: Exception, code: str) -> Envelope:
    import traceback

    traceback.print_exception(error)  # in this place's own log
    return Envelope(kind, {"failure": {"kind": type(error).__name__, "code": code}})

"""The courier: a Flower `ClientApp` that passes requests to the vault and answers back.

It has a network and sees no data: it imports neither torch nor the data code, and a vault it
talks to tells it nothing but releases and fixed codes. Flower would put the text of an exception
into the reply, so none leaves `handle`.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from veilgraft import messages
from veilgraft.errors import Refusal, VeilgraftError
from veilgraft.messages import Envelope, Refused

log = logging.getLogger(__name__)


WAIT_SECONDS = 900.0
"""For a vault's answer; it may have to restart, or to compute features first."""


class VaultLike(Protocol):
    """What a courier knows of a vault."""

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one request."""


def client_app(connect: Callable[[Context], VaultLike]) -> ClientApp:
    """Return the courier whose vault `connect` finds for a node."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    @app.evaluate()  # type: ignore[untyped-decorator]
    @app.train()  # type: ignore[untyped-decorator]
    def answer(message: Message, context: Context) -> Message:
        return Message(messages.to_record(_answer(message, context)), reply_to=message)

    def _answer(message: Message, context: Context) -> Envelope:
        try:
            request = messages.from_record(message.content)
        except VeilgraftError as error:
            log.warning("refused: %s", error)
            return _refused(b"", Refusal.REQUEST_INVALID)
        try:
            return connect(context).handle(request)
        except Exception:
            log.exception("no answer from the vault")
            return _refused(request.header, Refusal.UNAVAILABLE)

    return app


def _refused(header: bytes, code: Refusal) -> Envelope:
    """Answer in the place of a vault that can't; the site's name is the vault's to give."""
    return Envelope(Refused(site="unknown", request=messages.digest(header), code=code).encode())


def _beside(_: Context) -> VaultLike:
    """Return the vault of this site; its socket is named by the process that starts the courier."""
    from veilgraft_client.connection import VaultClient

    return VaultClient(Path(os.environ["VEILGRAFT_SOCKET"]), WAIT_SECONDS)


app = client_app(_beside)

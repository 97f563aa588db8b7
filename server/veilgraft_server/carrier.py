"""What carries questions to nodes and their answers back: Flower's grid.

A simulation in one process has a carrier of its own.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeAlias

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from veilgraft import messages
from veilgraft.errors import MessageError, VeilgraftError
from veilgraft.messages import Envelope

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Letter:
    """One question on its way.

    Attributes:
        node: Flower's id of it.
        type: Flower's message type.
        group: what belongs together; shown in Flower's logs.
        seconds: after which nobody waits for an answer.
    """

    node: int
    envelope: Envelope
    type: str
    group: str
    seconds: float


class LostError(VeilgraftError):
    """Answers that had come were lost, and nobody knows whose."""


class MissingError(MessageError):
    """No answer of the site's came, though one may yet."""


Answer: TypeAlias = Envelope | MessageError
"""What a node sent, or why that is none."""


class Carrier(Protocol):
    """See the module's docstring."""

    def there(self) -> Mapping[int, float]:
        """Return the nodes that are there, and when each started; seconds since 1970."""

    def send(self, letters: Sequence[Letter]) -> Iterable[str | None]:
        """Return an id for each letter; None where the node is not there."""

    def fetch(self, ids: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        """Yield answers that were not yet fetched, each with the id of its letter.

        Raises:
            LostError: ask again.
        """


@dataclass(frozen=True)
class Flower:
    """A carrier over Flower's grid.

    What a site sent may be no message at all. Flower raises over it, and forgets what it took with
    it: that is lost, and from then on each answer is fetched on its own.
    """

    grid: Grid
    _apart: threading.Event = field(default_factory=threading.Event)

    def there(self) -> Mapping[int, float]:
        """Return the nodes that are there, and when each started."""
        return {info.node_id: _seconds(info.last_activated_at) for info in self.grid.get_nodes()}

    def send(self, letters: Sequence[Letter]) -> Iterable[str | None]:
        """Push messages; return their ids."""
        ids: Iterable[str | None] = self.grid.push_messages(list(map(_message, letters)))
        return ids

    def fetch(self, ids: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        """Pull the replies that have come."""
        if self._apart.is_set():
            for id_ in ids:
                try:
                    yield from self._pulled([id_])
                except LostError as error:
                    yield id_, MissingError(str(error))
        else:
            yield from self._pulled(ids)

    def _pulled(self, ids: Sequence[str]) -> list[tuple[str, Answer]]:
        try:
            replies = list(self.grid.pull_messages(ids))
        except httpx.HTTPError:
            raise
        except Exception:
            log.exception("an answer is no message")
            self._apart.set()
            raise LostError("its answer is no message") from None
        return [(reply.metadata.reply_to_message_id, _answer(reply)) for reply in replies]


def _message(letter: Letter) -> Message:
    record = messages.to_record(letter.envelope)
    ttl = max(1.0, letter.seconds)
    return Message(record, letter.node, letter.type, ttl=ttl, group_id=letter.group)


def _answer(reply: Message) -> Answer:
    if reply.has_error():
        return MissingError(f"Flower error {reply.error.code}")
    try:
        return messages.from_record(reply.content)
    except MessageError as error:
        return error


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp() if stamp else 0.0

"""A network of real gates behind one grid, with a hostile or failing middle where a test asks."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from tests.client.gated import Party, party
from tests.server.grid import FIRST_NODE, LocalGrid

from veilgraft import messages
from veilgraft.identity import PublicKey, SigningKey
from veilgraft.messages import Envelope
from veilgraft_client.app import client_app
from veilgraft_server.carrier import Flower
from veilgraft_server.post import Post

Middle = Callable[[int, Envelope, Callable[[Envelope], Envelope]], Envelope | None]
"""What stands between: gets the node, the question and the vault; None loses the answer."""


class _LostError(BaseException):
    """No answer comes of it; the courier, who answers for any `Exception`, does not catch it."""


@dataclass
class Network:
    """Sites by node, the coordinator's key, and what it knows of them."""

    parties: dict[int, Party]
    key: SigningKey
    grid: "Wire"
    known: dict[int, tuple[str, PublicKey]]
    seen: list[tuple[int, messages.Question]] = field(default_factory=list)
    middle: Middle | None = None

    @property
    def post(self) -> Post:
        return Post(Flower(self.grid), self.key, self.known.get)

    def kinds(self, node: int) -> list[str]:
        """Return what a node was asked, in order."""
        return [asked.kind for to, asked in self.seen if to == node]


class Wire(LocalGrid):
    """The local grid with ids of its own for each message, and nodes that come and go."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        super().__init__(app, nodes)
        self.there = set(super().get_node_ids())
        self.count = 0

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.there)

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, last_activated_at="") for node in sorted(self.there)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
        ids: list[str | None] = []
        for message in messages:
            self.count += 1
            ids.append(self._pushed(message, f"m{self.count}"))
        return ids

    def _pushed(self, message: Message, identifier: str) -> str | None:
        node = message.metadata.dst_node_id
        if node not in self.there:
            return None
        message.metadata.__dict__["_message_id"] = identifier
        with contextlib.suppress(_LostError):
            self._replies[identifier] = self.answered(message)
        return identifier


@contextlib.contextmanager
def network(folder: Path, *names: str, **options: Any) -> Iterator[Network]:
    """Open a site for each name; node i is that of the i-th."""
    key = SigningKey.generate()
    with contextlib.ExitStack() as opened:
        parties = {
            FIRST_NODE + index: opened.enter_context(
                party(folder / str(index), key, name, **options)
            )
            for index, name in enumerate(names)
        }

        def connect(context: Context) -> Any:
            node = context.node_id

            def handle(envelope: Envelope) -> Envelope:
                made.seen.append((node, messages.decode_question(envelope.header)))
                gate = made.parties[node].gate.handle
                if made.middle is None:
                    return gate(envelope)
                answer = made.middle(node, envelope, gate)
                if answer is None:
                    raise _LostError
                return answer

            return SimpleNamespace(handle=handle)

        known = {node: (p.name, p.identity.public) for node, p in parties.items()}
        made = Network(parties, key, Wire(client_app(connect), len(names)), known)
        yield made

"""A Flower `Grid` without a network: messages go straight to who answers them.

The same server app and the same `Message`s as everywhere; only the transport differs. A round with
ten sites costs milliseconds, where Flower's Ray engine polls for a tenth of a second.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1
FIRST_NODE = 2

Answers: TypeAlias = Callable[[Sequence[Message]], Sequence[Message]]
"""Answers messages, each to the node that it names, in their order."""


def one_by_one(app: ClientApp, nodes: int) -> Answers:
    """Have a client app answer for `nodes` nodes, one message after the other."""
    contexts = {FIRST_NODE + index: _context(FIRST_NODE + index, index) for index in range(nodes)}
    return lambda asked: [app(each, contexts[each.metadata.dst_node_id]) for each in asked]


class InProcessGrid(Grid):  # type: ignore[misc]
    """Has `nodes` nodes answered for.

    Args:
        scope: entered around each exchange; the answers leave after it has ended well.
    """

    def __init__(
        self, answers: Answers, nodes: int, scope: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._answers = answers
        self._scope = scope
        self.context = _context(SERVER_NODE, -1)
        self._nodes = [FIRST_NODE + index for index in range(nodes)]
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(RUN_ID)
        # Flower 1.41 reads these when a Message is made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE

    def set_run(self, run: Run) -> None:
        """Set the run's facts."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's facts."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes' ids; the site with index i has the i-th."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages and keep the replies until they are pulled."""
        asked: dict[str, Message] = {}
        for message in messages:
            identifier = f"{message.metadata.group_id}:{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = identifier
            asked[identifier] = message
        with self._scope():
            answers = self._answers(list(asked.values()))
        self._replies |= zip(asked, answers, strict=True)
        return list(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies that were not yet pulled."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver messages and return their replies; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))


def _context(node: int, index: int) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=node,
        node_config={"partition-id": index},
        state=RecordDict(),
        run_config={},
    )

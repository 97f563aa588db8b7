"""A Flower `Grid` without a network: a client app answers for every node, in this process."""

from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1
FIRST_NODE = 2


class LocalGrid(Grid):  # type: ignore[misc]
    """Has `app` answer for `nodes` nodes."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        self._app = app
        self._contexts = {
            FIRST_NODE + index: _context(FIRST_NODE + index, index) for index in range(nodes)
        }
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(RUN_ID)
        # Flower 1.41 reads these when a Message is made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE

    def answered(self, message: Message) -> Message:
        """Return a node's reply."""
        reply: Message = self._app(message, self._contexts[message.metadata.dst_node_id])
        return reply

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages and keep the replies until they are pulled."""
        ids = []
        for message in messages:
            identifier = f"{message.metadata.group_id}:{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = identifier
            self._replies[identifier] = self.answered(message)
            ids.append(identifier)
        return ids

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

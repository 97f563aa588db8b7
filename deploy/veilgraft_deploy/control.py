"""Flower's control API, as the coordinator uses it: on loopback, to start and watch a run.

Not the `flwr` command, which takes seconds to start and keeps connections in a file that it writes.
"""

from pathlib import Path
from typing import NamedTuple, Self

import httpx

from veilgraft.errors import VeilgraftError
from veilgraft_deploy.provision import Bundle

Unreachable = httpx.HTTPError
"""Raised by every method while the SuperLink is down, or says no."""


LISTED = 1000
"""Runs looked through for our own; whoever reaches the SuperLink on loopback can start some."""


class FlowerRun(NamedTuple):
    """One Flower run: its id, and whether its app runs, or has ended, however it did."""

    id: int
    running: bool
    ended: bool


class Control:
    """A connection to the SuperLink on this machine; use as a context manager."""

    def __init__(self, port: int, ca: Path) -> None:
        from flwr.supercore.control import ControlHttpClient

        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=False,
            root_certificates=ca.read_bytes(),
            interceptors=[],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def answers(self) -> bool:
        """Return whether the SuperLink is up."""
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            self._client.ListRuns(ListRunsRequest(limit=1))
        except Unreachable:
            return False
        return True

    def newest(self, bundle: Bundle) -> FlowerRun | None:
        """Return the run of this bundle that was started last; what others started is no run."""
        from flwr.common.constant import Status
        from flwr.proto.control_pb2 import ListRunsRequest

        runs = self._client.ListRuns(ListRunsRequest(limit=LISTED)).run_dict.values()
        own = (run for run in runs if run.fab_hash == bundle.digest)
        run = max(own, key=lambda each: each.pending_at, default=None)
        if run is None:
            return None
        status = run.status.status
        return FlowerRun(run.run_id, status == Status.RUNNING, status == Status.FINISHED)

    def start(self, bundle: Bundle) -> int:
        """Start a run of the bundle and return its id."""
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = fab_to_proto(Fab(bundle.digest, bundle.content, {}))
        answer = self._client.StartRun(StartRunRequest(fab=fab))
        if not answer.HasField("run_id"):
            raise VeilgraftError("the SuperLink did not start the run")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        """End a run that has not ended."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._client.StopRun(StopRunRequest(run_id=run))

    def online(self) -> set[int]:
        """Return the ids of the nodes whose last heartbeat is recent."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.node_id for node in nodes if node.status == "online"}

"""Start Flower's app processes so that they run the installed apps, whatever bundle came.

A read-only FLWR_HOME alone does not hold in Flower 1.41: an app is installed under
`apps/PUBLISHER.NAME.VERSION.HASH`, and a bundle whose version holds `/../` is unpacked, and loaded,
wherever its writer likes. So the executor's PATH leads to `FLWR_HOME/bin`, and from there to here:
a bundle is compared, byte for byte, with the installed one, and every other is refused before it is
unpacked. Agents, connectors, models and simulations, which Flower would start too, are refused.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import veilgraft  # noqa: F401 - its switches must be set before Flower is imported

UPLOAD_SECONDS = 15.0
"""For the rest of a reply that a node has begun to send."""


def main() -> None:
    """Run the Flower command named by the first argument, or exit with 1."""
    command, sys.argv = sys.argv[1], sys.argv[1:]
    if log := os.environ.get("VEILGRAFT_APP_LOG"):
        _write_to(Path(log))
    match command:
        case "flwr-clientapp":
            client_app()
        case "flwr-serverapp":
            server_app()
        case "flower-supernode":
            supernode()
        case _:
            sys.exit(f"{command}: refused; only the installed apps run here")


def client_app() -> None:
    """Run the courier for one message."""
    from flwr.supernode.cli import flwr_clientapp

    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    utils = importlib.import_module("flwr.clientapp.utils")
    _replace(runtime, "install_from_fab", only_installed)
    # Id and version come beside the bundle, and could lead to another folder.
    _replace(runtime, "get_project_dir", _installed)
    _replace(utils, "get_project_dir", _installed)
    _replace(runtime, "Error", _wordless)
    flwr_clientapp()


def server_app() -> None:
    """Run the coordinator's app."""
    from flwr.superlink.cli import flwr_serverapp

    # The package names its function as it names this module, which an import would give instead.
    runtime = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    _replace(runtime, "install_from_fab", only_installed)
    _replace(runtime, "get_project_dir", _installed)
    grid = importlib.import_module("flwr.superlink.grid.http_grid")
    # A node that dies, or stops, in the middle of its reply would hold up all others: Flower would
    # wait for the rest for two hours. The site is asked again.
    pull = partial(grid.pull_objects, max_time=UPLOAD_SECONDS, initial_backoff=0.1, backoff_cap=1)
    _replace(grid, "pull_objects", pull)
    flwr_serverapp()


def supernode() -> None:
    """Run a SuperNode that does not tell how long the courier took, and opens no bundle.

    It would unpack a bundle's `pyproject.toml` for a configuration, which ours has not: a few
    megabytes that become gigabytes.
    """
    from flwr.supernode.cli import flower_supernode

    client = importlib.import_module("flwr.supernode.start_client_internal")
    _replace(client, "get_fused_config_from_fab", lambda *_: {})
    states = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate")
    _replace(states.InMemoryNodeState, "get_message_processing_duration", lambda *_, **__: 0.0)
    fleet = importlib.import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    activate = fleet.ActivateNode
    _replace(fleet, "ActivateNode", lambda own, request: _take_over(activate, own, request))
    flower_supernode()


def _take_over(activate: Callable[[Any, Any], Any], client: Any, request: Any) -> Any:
    """Activate this node; first say that the one before it has ended, where it ended here.

    SuperLink would refuse the successor of one that was killed for as long as its lease runs, a
    minute. Only for what ran on this machine, since it booted, is that known: of a copied folder,
    the second SuperNode must not take the place of the first.
    """
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from httpx import HTTPError

    note, boot = Path.home() / "node", Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError, ValueError, HTTPError):
        node, since = note.read_text().split()
        if since == boot:
            client.DeactivateNode(DeactivateNodeRequest(node_id=int(node)))
    answer = activate(client, request)
    note.write_text(f"{answer.node_id} {boot}")
    return answer


def only_installed(fab: bytes, *_: object, **__: object) -> Path:
    """Return the installed app; raises `PermissionError` for any bundle but its own."""
    if fab != (_home() / "bundle.fab").read_bytes():
        raise PermissionError("the bundle is not the one that is installed here")
    return _installed()


def _installed(*_: object) -> Path:
    (app,) = (_home() / "apps").iterdir()
    return app


def _wordless(code: int, reason: str | None = None) -> Any:
    """Make the error that a coordinator gets; an exception's text, and a path in it, stay here."""
    from flwr.app.error import Error

    return Error(code, "refused" if reason else None)


def _home() -> Path:
    return Path(os.environ["FLWR_HOME"])


def _write_to(log: Path) -> None:
    """Keep what the app says: Flower's executor throws a ServerApp's output away."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _replace(module: Any, name: str, new: object) -> None:
    """Put `new` where Flower looks; a Flower that has moved it must not run unguarded."""
    if not callable(getattr(module, name, None)):
        raise AttributeError(f"{module}: expected {name} there; this Flower can't be guarded")  # noqa: TRY004
    setattr(module, name, new)


if __name__ == "__main__":
    main()

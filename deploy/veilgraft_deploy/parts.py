"""The coordinator's processes, each a command that runs until it is ended.

`coordinator start` supervises them; containers and units run them one by one. They read the folder
alone, so one that starts again finds the others.
"""

import os
import sys
from pathlib import Path

import veilgraft  # noqa: F401 - its switches must be set before Flower is imported
from veilgraft_server.folder import Folder

POLL_SECONDS = "1.0"


def superlink(folder: Path) -> None:
    """Run the SuperLink on loopback."""
    place = _place(folder)
    from flwr.superlink.cli import flower_superlink

    sys.argv = [
        "flower-superlink",
        *("--host", "127.0.0.1"),
        *("--port", str(place.superlink_port())),
        *("--ssl-ca-certfile", str(place.ca)),
        *("--ssl-certfile", str(place.tls / "server.pem")),
        *("--ssl-keyfile", str(place.tls / "server.key")),
        "--enable-supernode-auth",
        *("--database", str(place.flower / "superlink.db")),
        "--disable-runtime-dependency-installation",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(place.secret)),
    ]
    flower_superlink()


def executor(folder: Path) -> None:
    """Run Flower's executor, which starts the ServerApp; its user alone may read `signing.pem`."""
    place = _place(folder)
    from flwr.supercore.cli import flower_superexec

    os.environ.update(
        PATH=f"{place.home / 'bin'}:/usr/bin:/bin",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL=POLL_SECONDS,
        VEILGRAFT_COORDINATOR=str(place.path),
        VEILGRAFT_APP_LOG=str(place.app_log),
    )
    sys.argv = [
        "flower-superexec",
        *("--runtime-api-address", f"127.0.0.1:{place.superlink_port()}"),
        *("--root-certificates", str(place.ca)),
        *("--superexec-auth-secret-file", str(place.secret)),
    ]
    flower_superexec()


def edge(folder: Path) -> None:
    """Run the edge, the one part that is reachable from outside."""
    from veilgraft_server import edge as server

    place = _place(folder)
    settings = place.settings
    server.serve(
        server.Settings(
            superlink=f"127.0.0.1:{place.superlink_port()}",
            superlink_ca=place.ca,
            registry=place.registry,
            ownership=place.flower / "edge.db",
            certificate=place.tls / "server.pem",
            key=place.tls / "server.key",
            host=settings.listen,
            port=settings.port,
            events=place.flower / "edge-events.db",
            status=place.status,
            metrics_port=settings.metrics_port,
        )
    )


def _place(folder: Path) -> Folder:
    """Return the folder; sets what Flower reads when it is imported, and who may read its files."""
    place = Folder.open(folder)
    os.umask(0o027)
    os.environ.update(FLWR_HOME=str(place.home), FLWR_LOG_LEVEL="WARNING")
    return place


def main() -> None:
    """Run `superlink`, `executor` or `edge` of a folder: `python -m … PART DIR`."""
    part, folder = sys.argv[1], Path(sys.argv[2])
    {"superlink": superlink, "executor": executor, "edge": edge}[part](folder)


if __name__ == "__main__":
    main()

"""A vault's service in a process of its own: `python vault_process.py FOLDER`.

It echoes. While FOLDER/hang exists, it notes a request in FOLDER/arrived and answers never.
"""

import sys
import time
from pathlib import Path
from typing import Any

from veilgraft.messages import Envelope
from veilgraft_client.service import Service


def main(folder: Path) -> None:
    """Serve until killed; says so on stdout once it does."""

    def handle(envelope: Envelope) -> Envelope:
        (folder / "arrived").write_bytes(envelope.header)
        while (folder / "hang").exists():
            time.sleep(0.05)
        return envelope

    def desk(verb: str, argument: str) -> dict[str, Any]:
        return {"verb": verb, "argument": argument}

    with Service(
        handle=handle,
        desk=desk,
        courier_socket=folder / "run" / "courier.sock",
        local_socket=folder / "state" / "local.sock",
        allowed_uids=frozenset({0, folder.stat().st_uid}),
    ):
        print("serving", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

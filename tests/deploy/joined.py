"""An edge that says what a test wants, and what a site needs to join through it."""

import contextlib
import email.utils
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sklearn.datasets import load_digits
from tests.client.gated import BACKBONE, DIGEST

from veilgraft.identity import SigningKey
from veilgraft.invitation import Coordinator, Invitation
from veilgraft.study import Study
from veilgraft_deploy import provision
from veilgraft_deploy.joining import Answers


@dataclass
class Edge:
    """What the false edge answers, and what it was asked."""

    port: int
    ca: str
    key: SigningKey
    ahead: float = 0.0
    date: str | None = None
    status: int = 200
    location: str | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def coordinator(self) -> Coordinator:
        return Coordinator(host="127.0.0.1", port=self.port, ca=self.ca, key=self.key.public.text)

    def invitation(self, site: str = "a", token: str = "t" * 43, **sections: Any) -> Invitation:
        return Invitation(
            site=site,
            coordinator=self.coordinator,
            token=token,
            expires=2**31,
            study=study(**sections).canonical,
        )

    def said(self) -> str:
        if self.date is not None:
            return self.date
        return email.utils.formatdate(time.time() + self.ahead, usegmt=True)


def study(**sections: Any) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": [str(digit) for digit in range(10)]},
        "backbone": {"digest": DIGEST, "path": BACKBONE, "modality": "image", "pooling": "mean"},
        "privacy": {"noise_multiplier": 5.0},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
    }
    return Study.parse({**values, **sections}, name="study.yaml")


@contextlib.contextmanager
def edge(folder: Path) -> Iterator[Edge]:
    """Serve a false edge over TLS on loopback."""
    folder.mkdir(parents=True, exist_ok=True)
    provision.authority(folder, "127.0.0.1")
    provision.certify(folder, "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            made.asked.append((self.path, {}))
            self._say()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.asked.append((self.path, json.loads(body)))
            self._say()

        def _say(self) -> None:
            self.send_response_only(made.status)
            self.send_header("Date", made.said())
            if made.location is not None:
                self.send_header("Location", made.location)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    made = Edge(server.server_port, (folder / "ca.pem").read_text(), SigningKey.generate())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


def records(path: Path, rows: int = 60) -> Path:
    """Write handwritten digits, mode 0600."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    digits = load_digits()
    images = []
    for pixels in digits.images[:rows]:
        into = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype("uint8")).save(into, "PNG")
        images.append(into.getvalue())
    labels = [str(digit) for digit in digits.target[:rows]]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    path.chmod(0o600)
    return path


def answers(data: Path, **changes: Any) -> Answers:
    values: dict[str, Any] = {"data": data, "units": 60, "isolation": "reduced"}
    return Answers(**{**values, **changes})

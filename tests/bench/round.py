"""What a round of a real federation costs beside Flower's own floor, on loopback, in one run.

First the floor: a SuperLink and three SuperNodes as Flower starts them, whose ClientApp returns
what it gets, asked six times and looked at every fifth of a second. Then a coordinator and three
sites, six rounds, from one finished round to the next. Each site holds its answers for
`reply_seconds`, half a second by default.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.federation import NoOpFederationManager

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.server.superlink import certify, superlink
from tests.system.command import DEMO
from tests.system.federation import Federation
from tests.system.hostile import bundle

SITES, ROUNDS, LOOK_SECONDS, PATIENCE = 3, 6, 0.2, 60.0
TRIVIAL = """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def answer(message, context):
    return Message(message.content, reply_to=message)
"""


def main() -> None:
    """Measure both, and print medians."""
    floor, ours = _floor(), _ours()
    print(f"Flower's floor {statistics.median(floor):.2f} s ({min(floor):.2f} to {max(floor):.2f})")
    print(f"a round        {statistics.median(ours):.2f} s ({min(ours):.2f} to {max(ours):.2f})")
    print(f"beyond it      {statistics.median(ours) - statistics.median(floor):.2f} s")


def _floor() -> list[float]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        certify(folder)
        address = running.enter_context(superlink(folder))
        link = _Link(folder)
        nodes = [link.node(folder / f"node-{index}") for index in range(SITES)]
        for index in range(SITES):
            running.enter_context(_supernode(folder, folder / f"node-{index}", address))
        # The first exchange fetches the bundle, and is not counted.
        return [link.exchange(nodes) for _ in range(ROUNDS + 1)][1:]


class _Link:
    """Puts one run and its messages into SuperLink's state, as a ServerApp would."""

    def __init__(self, folder: Path) -> None:
        database = str(folder / "superlink.db")
        _, factory = get_objectstore_linkstate_factories(database, NoOpFederationManager())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.state = factory.state()
        made = bundle({"trivial/__init__.py": "", "trivial/app.py": TRIVIAL}, "trivial.app:app")
        self.state.store_fab(Fab(made.digest, made.content, {}))
        self.run: int = self.state.create_run(
            "veilgraft/veilgraft",
            "1.0.0",
            made.digest,
            {},
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        self.task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        assert self.state.claim_task(self.task)
        assert self.state.activate_task(self.task)
        TaskIdentity.task_id, TaskIdentity.run_id = self.task, self.run
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def node(self, path: Path) -> int:
        key = ec.generate_private_key(ec.SECP384R1())
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        path.chmod(0o600)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        made: int = self.state.create_node(NOOP_FLWR_AID, path.name, public, 30)
        return made

    def exchange(self, nodes: list[int]) -> float:
        started = time.monotonic()
        waiting = {self._send(node, started + PATIENCE) for node in nodes}
        while waiting:
            assert time.monotonic() < started + PATIENCE, "no answer"
            self.state.acknowledge_task_heartbeat(self.task)
            for reply in self.state.get_message_res(waiting, self.run):
                assert not reply.has_error(), reply.error
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - started

    def _send(self, node: int, until: float) -> str:
        content = RecordDict({"q": ConfigRecord({"text": f"{time.time()} {node}"})})
        message = Message(content, node, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        session, tree = self.state.start_session(self.run), get_object_tree(message)
        while True:
            stored, missing = self.state.store_message_and_object_tree(message, tree, session)
            if stored:
                break
            assert time.monotonic() < until, "a node did not come"
            time.sleep(LOOK_SECONDS)
        for name, each in get_all_nested_objects(message).items():
            if name in missing:
                assert self.state.store_object(self.run, session, name, each.deflate())
        return str(message.object_id)


class _supernode:  # noqa: N801
    def __init__(self, folder: Path, key: Path, address: str) -> None:
        command: list[str | Path] = [
            Path(sys.executable).with_name("flower-supernode"),
            "--superlink",
            address,
        ]
        command += ["--root-certificates", folder / "ca.pem", "--isolation", "subprocess"]
        command += ["--auth-supernode-private-key", key, "--host", "127.0.0.1"]
        with socket.create_server(("127.0.0.1", 0)) as free:
            command += ["--port", str(free.getsockname()[1])]
        env = {**os.environ, "FLWR_HOME": str(key.with_suffix(".home")), "OMP_NUM_THREADS": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        with key.with_suffix(".log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def __enter__(self) -> "_supernode":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


def _ours() -> list[float]:
    by_hand = ("--backbone", str(DEMO / "backbone"))
    with Federation(rounds=ROUNDS + 1, namespaces=False, join=by_hand) as federation:
        federation.wait_for(lambda: federation.report() is not None, 300.0, "the report")
        notes = [note for note in federation.events("coordinator") if note.kind == "round"]
    at = [datetime.fromisoformat(note.time).timestamp() for note in notes]
    return [after - before for before, after in pairwise(at)]


if __name__ == "__main__":
    main()

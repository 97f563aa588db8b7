"""A real SuperLink and a real edge on loopback, and sites that talk to them, for test_edge.py."""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.federation import NoOpFederationManager

from veilgraft.identity import SigningKey
from veilgraft_server.edge import Edge, Settings, bound
from veilgraft_server.enrolment import NODE_SIGNATURE_HEADER, SIGNATURE_HEADER
from veilgraft_server.listener import Limits, Listener

PATIENCE = 30.0


def certify(folder: Path) -> None:
    """Write ca.pem, server.pem and server.key for 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    built = {}
    for file, public, ca in (("ca", ca_key, True), ("server", key, False)):
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test" if ca else "edge")])
        built[file] = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(public.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(ca_key, SHA256())
        )
        (folder / f"{file}.pem").write_bytes(built[file].public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[str]:
    """Run SuperLink as a coordinator does; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "executor.secret").write_bytes(os.urandom(32))
    command: list[str | Path] = [Path(sys.executable).with_name("flower-superlink")]
    command += ["--host", "127.0.0.1"]
    command += ["--port", str(port), "--database", folder / "superlink.db"]
    command += ["--ssl-ca-certfile", folder / "ca.pem", "--ssl-certfile", folder / "server.pem"]
    command += ["--ssl-keyfile", folder / "server.key", "--enable-supernode-auth"]
    command += ["--isolation", "process", "--superexec-auth-secret-file"]
    command += [folder / "executor.secret", "--disable-runtime-dependency-installation"]
    environment = {**os.environ, "FLWR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _await_listening(process, port, folder / "superlink.log")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()  # a polite end waits for all its connections
        process.wait(PATIENCE)


def _await_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.1)


@contextlib.contextmanager
def edge(
    folder: Path, address: str, limits: Limits | None = None, superlink_seconds: float = 25.0
) -> Iterator[str]:
    """Serve the edge over TLS from a thread; yield its URL."""
    settings = Settings(
        superlink=address,
        superlink_ca=folder / "ca.pem",
        registry=folder / "registry.db",
        ownership=folder / "edge.db",
        certificate=folder / "server.pem",
        key=folder / "server.key",
        limits=limits or Limits(),
        superlink_seconds=superlink_seconds,
    )
    listening = bound("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = Edge(settings)
    listener = Listener(app, listening, settings.certificate, settings.key, settings.limits)

    async def run() -> None:
        await listener.serve()
        await app.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        until = time.monotonic() + PATIENCE
        while not listener.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield f"https://127.0.0.1:{port}"
    finally:
        listener.should_exit = True
        thread.join(PATIENCE)
    assert not thread.is_alive()


@dataclass
class Site:
    """A site's side of the edge: its two keys and an HTTP client."""

    name: str
    client: httpx.Client
    token: str = ""
    node_id: int = 0
    identity: SigningKey = field(default_factory=SigningKey.generate)
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )

    @property
    def pem(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def node(self) -> Node:
        return Node(node_id=self.node_id)

    def enrol(self, **changes: Any) -> httpx.Response:
        """Post an enrolment; what `changes` names is said instead, and signed as well."""
        said: dict[str, Any] = {"site": self.name, "token": self.token}
        said |= {"identity": self.identity.public.text, "node": self.pem.decode()}
        said |= {"time": int(time.time())}
        body = json.dumps(said | changes).encode()
        return self.post_enrolment(body, body, body)

    def post_enrolment(self, body: bytes, signed: bytes, node_signed: bytes) -> httpx.Response:
        headers = {
            SIGNATURE_HEADER: self.identity.sign("enrolment", signed).hex(),
            NODE_SIGNATURE_HEADER: self.key.sign(node_signed, ec.ECDSA(SHA256())).hex(),
        }
        response = self.client.post("/veilgraft/enrol", content=body, headers=headers)
        if response.status_code == 200:
            self.node_id = response.json()["node_id"]
        return response

    def headers(self, ahead: float = 0.0) -> dict[str, str]:
        """Return what a SuperNode of this key sends, by a clock that is `ahead` seconds ahead."""
        moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
        stamp = moment.isoformat()
        signature = self.key.sign(stamp.encode(), ec.ECDSA(SHA256()))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.pem).decode(),
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }

    def call(self, name: str, request: Any, ahead: float = 0.0) -> httpx.Response:
        return self.client.post(
            f"/v1/fleet/{name}", content=request.SerializeToString(), headers=self.headers(ahead)
        )

    def activate(self) -> httpx.Response:
        request = fleet_pb2.ActivateNodeRequest(public_key=self.pem, heartbeat_interval=30)
        return self.call("activate-node", request)

    def beat(self, ahead: float = 0.0) -> httpx.Response:
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30)
        return self.call("send-node-heartbeat", request, ahead)

    def pull(self) -> tuple[Any, Any]:
        """Take the message that waits for this site, and its object tree."""
        response = self.call("pull-messages", fleet_pb2.PullMessagesRequest(node=self.node))
        answer = fleet_pb2.PullMessagesResponse.FromString(response.content)
        return answer.messages_list[0], answer.message_object_trees[0]

    def pull_object(self, run: int, name: str) -> httpx.Response:
        request = message_pb2.PullObjectRequest(node=self.node, run_id=run, object_id=name)
        return self.call("pull-object", request)

    def confirm(self, run: int, name: str) -> httpx.Response:
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=name
        )
        return self.call("confirm-message-received", request)

    def push(self, reply: Message, tree: Any = None) -> httpx.Response:
        request = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[_bare(reply)],
            message_object_trees=[tree or get_object_tree(reply)],
            clientapp_runtime_list=[0.1],
        )
        return self.call("push-messages", request)

    def push_object(self, run: int, session: str, name: str, content: bytes) -> httpx.Response:
        request = message_pb2.PushObjectRequest(
            node=self.node, run_id=run, session_id=session, object_id=name, object_content=content
        )
        return self.call("push-object", request)


def _bare(message: Message) -> Any:
    proto = message_to_proto(message)
    proto.content.Clear()
    proto.content.SetInParent()
    return proto


def reply_to(proto: Any, text: str) -> Message:
    """Return a reply to a message that a site pulled."""
    reply = Message(
        RecordDict({"r": ConfigRecord({"text": text})}), reply_to=message_from_proto(proto)
    )
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def contents(message: Message) -> dict[str, bytes]:
    return {name: made.deflate() for name, made in get_all_nested_objects(message).items()}


def client(url: str, folder: Path) -> httpx.Client:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    return httpx.Client(base_url=url, verify=context, trust_env=False, timeout=PATIENCE)


LAST = "host: x\r\nconnection: close\r\n"


def raw(url: str, folder: Path, data: bytes) -> bytes:
    """Send bytes over TLS, and return all that comes until the edge closes."""
    host, port = url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    with (
        socket.create_connection((host, int(port)), 10.0) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


class Run:
    """A run that is under way in SuperLink's database, and the messages of its ServerApp."""

    def __init__(self, folder: Path) -> None:
        database = str(folder / "superlink.db")
        _, factory = get_objectstore_linkstate_factories(database, NoOpFederationManager())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Alembic's, in Flower's files
            self.state = factory.state()
        self.id: int = self.state.create_run(
            "a/b", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[self.id])[0].primary_task_id
        assert self.state.claim_task(task) and self.state.activate_task(task)
        TaskIdentity.task_id, TaskIdentity.run_id = task, self.id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def send(self, node_id: int, text: str) -> None:
        """Put a message for a node into SuperLink's state."""
        message = Message(RecordDict({"q": ConfigRecord({"text": text})}), node_id, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.id)
        stored, missing = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
        for name, content in contents(message).items():
            if name in missing:
                assert self.state.store_object(self.id, session, name, content)

    def replies(self, message_id: str) -> list[Message]:
        found: list[Message] = self.state.get_message_res({message_id}, self.id)
        return found

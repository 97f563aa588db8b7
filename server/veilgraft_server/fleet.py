"""What a site may ask of SuperLink: the calls that a SuperNode makes, about what is its own.

`authenticate` says which site asks, `check` whether it may, and `learn` notes from SuperLink's
answer what the site may ask next. None of them touches the network.
"""

import binascii
import datetime
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from google.protobuf.message import (  # type: ignore[import-untyped,unused-ignore]
    DecodeError,
    Message,
)

from veilgraft.errors import MessageError, Refusal, RefusedError
from veilgraft.identity import SignatureError
from veilgraft_server.ownership import Ownership
from veilgraft_server.registry import Registry

PREFIX = "/v1/fleet/"
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""All that passes the edge: `POST /v1/fleet/` and one of these."""

AUTH_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
MAX_OBJECTS, MAX_REPLY = 32, 72 << 20
"""Objects that one reply may be made of, and bytes of them; a vault's answer has at most 65 MiB."""

_REQUESTS: Mapping[str, type[Message]] = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": fab_pb2.GetFabRequest,
    "push-object": message_pb2.PushObjectRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}
_OLDEST = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


@dataclass(frozen=True)
class Caller:
    """A site that has shown who it is.

    Attributes:
        key: its SuperNode's public key, as PEM.
    """

    site: str
    key: bytes
    node_id: int


def authenticate(headers: Mapping[str, str], registry: Registry, now: float) -> Caller:
    """Return the site that signed the request's time, by Flower's rules.

    Args:
        now: seconds since 1970.

    Raises:
        SignatureError: a header is missing or wrong, the time is more than 5 s ahead or 305 s
            behind, or the key is no site's that has enrolled and was not revoked.
    """
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = headers[TIMESTAMP_HEADER]
        signed = datetime.datetime.fromisoformat(stamp)
    except (KeyError, ValueError, binascii.Error):
        raise SignatureError("a header is missing or malformed") from None
    member = registry.by_key(key)
    if member is None or member.node_id is None:
        raise SignatureError("the key is no site's")
    if signed.tzinfo is None or not -SYSTEM_TIME_TOLERANCE < now - signed.timestamp() < _OLDEST:
        raise SignatureError(f"{member.site}: the clock is off")
    check_node_signature(key, stamp.encode(), signature)
    return Caller(member.site, key, member.node_id)


def check_node_signature(key: bytes, data: bytes, signature: bytes) -> None:
    """Raise `SignatureError` unless it is by this PEM key: ECDSA on a NIST curve, SHA-256."""
    try:
        public = load_pem_public_key(key)
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise SignatureError("expected an ECDSA key")
        public.verify(signature, data, ec.ECDSA(SHA256()))
    except (ValueError, InvalidSignature):
        raise SignatureError("the signature is not by the node's key") from None


def parse(call: str, body: bytes) -> Any:
    """Return the request of a call, without fields that Flower does not know.

    Raises:
        MessageError: it is none.
    """
    request = _REQUESTS[call]()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise MessageError(f"{call}: malformed") from None
    request.DiscardUnknownFields()
    return request


def check(caller: Caller, call: str, request: Any, ownership: Ownership) -> bytes | None:
    """Return None where SuperLink is to answer the request, or the answer itself.

    Raises:
        RefusedError: it is about what is not the caller's.
    """
    if not _is_own(caller, call, request, ownership):
        raise RefusedError(Refusal.REQUEST_INVALID, f"{call}: not this site's")
    if call == "push-object" and ownership.was_stored(*_pushed(caller, request)):
        # SuperLink would say that it wasn't, and a SuperNode that missed one answer would drop
        # the reply that it has brought.
        stored: bytes = message_pb2.PushObjectResponse(stored=True).SerializeToString()
        return stored
    return None


def _is_own(caller: Caller, call: str, request: Any, ownership: Ownership) -> bool:
    match call:
        case "activate-node":
            return bool(request.public_key == caller.key)
        case "deactivate-node":
            return bool(request.node_id == caller.node_id)
    node = caller.node_id
    if request.node.node_id != node:
        return False
    match call:
        case "send-node-heartbeat" | "pull-messages":
            return True
        case "get-run" | "get-fab":
            return ownership.in_run(node, request.run_id)
        case "pull-object":
            return ownership.may_pull(node, request.run_id, request.object_id)
        case "confirm-message-received":
            return ownership.holds(node, request.run_id, request.message_object_id)
        case "push-messages":
            return _is_reply(node, request, ownership)
        case "push-object":
            further = len(request.object_content)
            return ownership.may_push(*_pushed(caller, request), further, MAX_REPLY)
    return False


def learn(caller: Caller, call: str, request: Any, answer: bytes, ownership: Ownership) -> None:
    """Note what SuperLink's answer lets the site ask next; to be done before it gets the answer.

    Raises:
        MessageError: the answer is malformed, or gives the site what is another's.
    """
    node = caller.node_id
    match call:
        case "activate-node":
            _agreed(_parsed(fleet_pb2.ActivateNodeResponse, answer).node_id == node)
        case "pull-messages":
            given = _parsed(fleet_pb2.PullMessagesResponse, answer)
            pairs = zip(given.messages_list, given.message_object_trees, strict=True)
            for message, tree in pairs:
                meta = message.metadata
                _agreed(meta.dst_node_id == node)
                ownership.give(node, meta.run_id, meta.message_id, list(_names(tree)))
        case "push-messages":
            asked = _parsed(fleet_pb2.PushMessagesResponse, answer)
            message = request.messages_list[0].metadata.reply_to_message_id
            ownership.ask(node, message, asked.session_id, list(asked.objects_to_push))
        case "push-object":
            if _parsed(message_pb2.PushObjectResponse, answer).stored:
                ownership.store(*_pushed(caller, request), len(request.object_content))


def _is_reply(node: int, request: Any, ownership: Ownership) -> bool:
    """Return whether the request brings this node's one reply to a message that it was given."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    meta, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    names = list(_names(tree))
    return (
        meta.src_node_id == node
        and meta.message_id == tree.object_id
        and len(names) <= MAX_OBJECTS
        and ownership.reply(node, meta.run_id, meta.reply_to_message_id, meta.message_id, names)
    )


def _pushed(caller: Caller, request: Any) -> tuple[int, int, str, str]:
    return caller.node_id, request.run_id, request.session_id, request.object_id


def _names(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _names(child)


def _parsed(kind: Any, answer: bytes) -> Any:
    try:
        return kind.FromString(answer)
    except DecodeError:
        raise MessageError("SuperLink's answer is malformed") from None


def _agreed(agrees: bool) -> None:
    if not agrees:
        raise MessageError("SuperLink's answer is for another node")

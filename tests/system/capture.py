"""Takes apart what a site sent: HTTP requests, Flower's messages in them, and ours in those.

Every value found has a name: `path /v1/…`, `header NAME`, `TYPE.FIELD` for a field of one of
Flower's protobuf types or objects or of our headers, `KIND payload: NAME` for what a payload holds.
What can't be taken apart to the last byte raises an error.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import h11
import safetensors.numpy
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.recorddict_pb2 import ConfigRecord as ProtoConfigRecord
from flwr.supercore.inflatable import inflatable_object as inflatable
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from veilgraft import messages
from veilgraft.messages import EMPTY, Envelope, Reply
from veilgraft_server import fleet

ENROL = "/veilgraft/enrol"
HEALTH = "/veilgraft/health"
VARYING = ("content-length", "flwr-signature", "x-veilgraft-node-signature")
"""Headers whose text is longer or shorter by chance."""


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def message(self) -> Any:
        """The protobuf message in the body of one of Flower's calls."""
        made = fleet.parse(self.path.removeprefix(fleet.PREFIX), self.body)
        # Fields that Flower does not know have been dropped.
        assert made.ByteSize() == len(self.body), f"{self.path}: unknown fields"
        return made


def calls(sent: bytes) -> Iterator[Call]:
    """Return the requests that one connection carried; one cut off at the end is left out."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(sent)
    while isinstance(request := connection.next_event(), h11.Request):
        body = bytearray()
        while isinstance(part := connection.next_event(), h11.Data):
            body += part.data
        if part is h11.NEED_DATA:
            return
        assert isinstance(part, h11.EndOfMessage) and not part.headers
        headers = tuple((name.decode(), value.decode()) for name, value in request.headers)
        yield Call(request.method.decode(), request.target.decode(), headers, bytes(body))
        # Only what an answer does to the connection's state matters here.
        connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        connection.send(h11.EndOfMessage())
        if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
            return
        connection.start_next_cycle()


def names(call: Call) -> Iterator[str]:
    """Name everything that a request holds; what a reply of ours holds, `said` does."""
    yield f"path {call.path}"
    yield from (f"header {name}" for name, _ in call.headers)
    if call.path == HEALTH:
        assert not call.body
    elif call.path == ENROL:
        yield from (f"Enrolment.{key}" for key in json.loads(call.body))
    else:
        yield from _fields(call.message)
        if isinstance(call.message, PushObjectRequest):
            yield from _object(call.message.object_content)


def _fields(message: Any) -> Iterator[str]:
    for field, value in message.ListFields():
        # Its content is taken apart as an object; there is none beside it.
        yield f"{message.DESCRIPTOR.name}.{field.name}"
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                yield from _fields(each)


def _object(content: bytes) -> Iterator[str]:
    """Name what one of Flower's objects holds; each says its type, its parts and its length."""
    kind = inflatable.get_object_type_from_object_content(content)
    body = content[content.index(b"\0") + 1 :]
    match kind:
        case "Message":
            made = ProtoMessage.FromString(body)
            made.DiscardUnknownFields()
            assert made.ByteSize() == len(body)
            yield from _fields(made)
        case "ConfigRecord":
            record = ProtoConfigRecord.FromString(body)
            record.DiscardUnknownFields()
            assert record.ByteSize() == len(body)
            yield from (f"ConfigRecord.{item.key}" for item in record.items)
        case "RecordDict" | "ArrayRecord" | "Array":
            yield from (f"{kind}.{key}" for key in json.loads(body))
        case _:
            assert kind == "ArrayChunk", kind
            yield "ArrayChunk"


def replies(
    sent: Iterable[Call], elsewhere: Iterable[Call] = ()
) -> Iterator[tuple[Reply, Envelope]]:
    """Return our messages, put together from the objects in which they were pushed.

    Args:
        elsewhere: what other sites sent; SuperLink does not ask twice for an object that it has,
            as for an empty payload.
    """
    pushed, own = _pushed(sent)
    parts, used = _pushed(elsewhere)[1] | own, set[str]()
    for each in pushed:
        if isinstance(each, PushMessagesRequest):
            (tree,) = each.message_object_trees
            ids = set(inflatable_ids(tree))
            if not ids <= parts.keys():
                continue
            used |= ids
            message = inflate_object_from_contents(
                tree.object_id, dict(parts), keep_object_contents=True
            )
            assert isinstance(message, Message)
            envelope = messages.from_record(message.content)
            assert messages.to_record(envelope).object_id == message.content.object_id
            yield messages.decode_answer(envelope.header), envelope
    assert used >= own.keys(), "objects that are part of no message"


def _pushed(sent: Iterable[Call]) -> tuple[list[Any], dict[str, bytes]]:
    """Return the calls to SuperLink, and the objects that they brought."""
    pushed = [call.message for call in sent if call.path.startswith(fleet.PREFIX)]
    objects = [each for each in pushed if isinstance(each, PushObjectRequest)]
    return pushed, {each.object_id: each.object_content for each in objects}


def objects_named(sent: Iterable[Call]) -> set[str]:
    """Return the ids of all objects that a site's answers are made of, pushed by it or not."""
    pushed = [each for each in _pushed(sent)[0] if isinstance(each, PushMessagesRequest)]
    trees = [tree for each in pushed for tree in each.message_object_trees]
    return {id_ for tree in trees for id_ in inflatable_ids(tree)}


def object_in(call: Call) -> str | None:
    """Return the id of the object that a request brings; None where it brings none."""
    message = call.message if call.path.startswith(fleet.PREFIX) else None
    return message.object_id if isinstance(message, PushObjectRequest) else None


def inflatable_ids(tree: Any) -> Iterator[str]:
    """Return the ids of an object and of all its parts."""
    yield tree.object_id
    for child in tree.children:
        yield from inflatable_ids(child)


def said(reply: Reply, envelope: Envelope) -> Iterator[str]:
    """Name what one of our replies holds."""
    kind = type(reply).__name__
    yield from (f"{kind}.{key}" for key in json.loads(envelope.header))
    yield f"{kind} signature"
    assert messages.digest(envelope.payload) == reply.payload
    if reply.payload == EMPTY:
        return
    match kind:
        case "Wanted":
            yield from (f"Wanted payload: {key}" for key in json.loads(envelope.payload))
        case _:
            assert kind == "Release", kind
            arrays = safetensors.numpy.load(envelope.payload)
            # Nothing beside the arrays: no metadata, no padding.
            assert messages.pack(arrays) == envelope.payload
            yield from (f"Release payload: {name}" for name in arrays)


def shape(call: Call) -> tuple[object, ...]:
    """Return a request's form: its fields and their sizes, ids and signatures apart."""
    headers = tuple((k, len(v) if k not in VARYING else None) for k, v in call.headers)
    size = len(call.body)
    if call.path.startswith(fleet.PREFIX):
        size = _size(call.message)
    return call.path, headers, tuple(sorted(names(call))), size


def _size(message: Any) -> int:
    blanked = _blanked(message)
    if not isinstance(message, PushObjectRequest):
        return int(blanked.ByteSize())
    content = message.object_content
    if inflatable.get_object_type_from_object_content(content) == "Message":
        inner = ProtoMessage.FromString(content[content.index(b"\0") + 1 :])
        blanked.object_content = bytes(_blanked(inner).ByteSize())
    return int(blanked.ByteSize())


def _blanked(message: Any) -> Any:
    """Return a copy with 1 for every integer: a node's random id is of nine or ten bytes."""
    made = type(message)()
    made.CopyFrom(message)
    for field, value in made.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                each.CopyFrom(_blanked(each))
        elif isinstance(value, int) and not isinstance(value, bool):
            setattr(made, field.name, 1)
    return made

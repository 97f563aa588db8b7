"""What travels: exact bytes, and nothing unknown."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilgraft import messages
from veilgraft.errors import MessageError, Refusal
from veilgraft.messages import Envelope, Hello, Here, Offer, Part, Refused, Release, Request, Wanted

SHAPES: dict[str, tuple[int, ...]] = {"linear0.weight": (2, 3), "linear0.bias": (2,)}
DIGEST = "sha256:" + "0" * 64


def arrays() -> dict[str, np.ndarray]:
    return {"linear0.weight": np.arange(6.0).reshape(2, 3), "linear0.bias": np.ones(2)}


def request() -> Request:
    return Request(site="a", study=DIGEST, run="r", round=1, head=DIGEST, rate=0.5)


def test_arrays_come_back_as_they_went() -> None:
    back = messages.unpack(messages.pack(arrays()), SHAPES)
    assert list(back) == list(SHAPES)
    for name, array in arrays().items():
        assert np.array_equal(back[name], array)


def test_equal_arrays_give_equal_bytes_in_any_order() -> None:
    reordered = dict(reversed(arrays().items()))
    assert messages.pack(arrays()) == messages.pack(reordered)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"linear0.bias": np.array([1.0, np.nan])}, "linear0.bias: expected finite numbers"),
        ({"linear0.bias": np.array([1.0, np.inf])}, "linear0.bias: expected finite numbers"),
        ({"linear0.bias": np.ones(3)}, r"expected float64 \[2\], got float64 \[3\]"),
        ({"linear0.bias": np.ones((1, 2))}, r"got float64 \[1, 2\]"),
        ({"linear0.bias": np.ones(2, np.float32)}, r"got float32 \[2\]"),
        ({"other": np.ones(2)}, "expected .*'linear0.weight'"),
        ({"other": np.ones(10_000)}, "bytes, got"),
    ],
)
def test_arrays_other_than_those_named_are_refused(
    change: dict[str, np.ndarray], expected: str
) -> None:
    with pytest.raises(MessageError, match=expected):
        messages.unpack(messages.pack(arrays() | change), SHAPES)


@given(st.binary(max_size=300))
def test_any_bytes_are_arrays_or_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        messages.unpack(data, SHAPES)


def test_a_missing_array_is_refused() -> None:
    with pytest.raises(MessageError):
        messages.unpack(messages.pack({"linear0.bias": np.ones(2)}), SHAPES)


def test_a_header_comes_back_as_it_went() -> None:
    assert Request.decode(request().encode()) == request()


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_header_or_a_message_error(data: bytes) -> None:
    for decode in (Request.decode, messages.decode_answer):
        with pytest.raises(MessageError):
            decode(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"round":1', b'"round":-1'),
        (b'"round":1', b'"round":"1"'),
        (b'"round":1', b'"round":1,"seed":3'),
        (b'"rate":0.5', b'"rate":NaN'),
        (b'"site":"a"', b'"site":"../a"'),
        (b"}", b"} "),
    ],
)
def test_a_header_that_is_not_exactly_of_its_form_is_refused(old: bytes, new: bytes) -> None:
    data = request().encode()
    assert old in data
    if new == b"} ":
        data += b"x"
    with pytest.raises(MessageError):
        Request.decode(data.replace(old, new) if new != b"} " else data)


def test_a_long_header_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MessageError, match="at most 4096 bytes"):
        Request.decode(b"{" + b" " * 5000 + b"}")


def test_an_answer_is_told_by_its_kind() -> None:
    release = Release(site="a", request=DIGEST, payload=DIGEST)
    refused = Refused(site="a", request=DIGEST, code=Refusal.UNAVAILABLE)
    assert messages.decode_answer(release.encode()) == release
    assert messages.decode_answer(refused.encode()) == refused


def test_flower_carries_the_exact_bytes() -> None:
    envelope = Envelope(request().encode(), messages.pack(arrays()))
    record = messages.to_record(envelope)
    assert messages.from_record(type(record).inflate(*_deflated(record))) == envelope


def _deflated(record: object) -> tuple[bytes, dict[str, object]]:
    children = dict(record.children)  # type: ignore[attr-defined]
    return record.deflate(), children  # type: ignore[attr-defined]


def test_a_foreign_record_is_a_message_error() -> None:
    from flwr.app import ConfigRecord, RecordDict

    for record in (
        RecordDict(),
        RecordDict({"header": ConfigRecord({"bytes": b""})}),
        RecordDict({"header": ConfigRecord({"bytes": 1}), "payload": ConfigRecord({"bytes": 1})}),
    ):
        with pytest.raises(MessageError):
            messages.from_record(record)


SEAL: dict[str, Any] = {"key": DIGEST, "nonce": "0" * 32, "expires": 5}


@pytest.mark.parametrize(
    "asked",
    [
        Hello(study=DIGEST, run="r", **SEAL),
        Hello(study=DIGEST, run="r", attempt=3, payload=DIGEST),
        Request(site="a", study=DIGEST, run="r", round=1, head=DIGEST, rate=0.5, **SEAL),
        Offer(site="a", study=DIGEST, run="r", payload=DIGEST, **SEAL),
        Part(site="a", study=DIGEST, run="r", name="x.y", offset=0, payload=DIGEST, **SEAL),
    ],
)
def test_a_question_is_told_by_its_kind_and_comes_back_as_it_went(asked: messages.Question) -> None:
    data = asked.encode()
    assert messages.decode_question(data) == asked
    assert len(data) < messages.MAX_HEADER
    with pytest.raises(MessageError):
        messages.decode_answer(data)


@pytest.mark.parametrize(
    "answer",
    [
        Here(site="a", request=DIGEST, approved=False, backbone=False, isolation="reduced"),
        Wanted(site="a", request=DIGEST, payload=DIGEST),
        Release(site="a", request=DIGEST, payload=DIGEST),
        Refused(site="a", request=DIGEST, code=Refusal.HEAD_INVALID),
    ],
)
def test_an_answer_comes_back_as_it_went_and_is_no_question(answer: messages.Reply) -> None:
    assert messages.decode_answer(answer.encode()) == answer
    with pytest.raises(MessageError):
        messages.decode_question(answer.encode())


def test_a_release_without_kind_round_or_head_is_no_question() -> None:
    for left_out in ("kind", "site", "round", "head", "study", "run"):
        values = json.loads(request().encode())
        del values[left_out]
        with pytest.raises(MessageError, match=left_out):
            messages.decode_question(json.dumps(values).encode())


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("", False),
        (".", False),
        ("..", False),
        (".hidden", False),
        ("a/b", False),
        ("../x", False),
        ("a\\b", False),
        ("x\n", False),
        ("x\0", False),
        ("ä", False),
        ("x" * 129, False),
    ],
)
def test_a_part_is_of_a_plain_file(name: str, fits: bool) -> None:
    part = Part(site="a", study=DIGEST, run="r", name="x", offset=0, payload=DIGEST)
    data = json.dumps(json.loads(part.encode()) | {"name": name}).encode()
    if fits:
        assert messages.decode_question(data) == part.model_copy(update={"name": name})
        return
    with pytest.raises(MessageError, match="name"):
        messages.decode_question(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "0" * 31},
        {"nonce": "0" * 33},
        {"nonce": "A" * 32},
        {"nonce": "0" * 32 + "\n"},
        {"expires": 0},
        {"expires": -1},
        {"expires": 1.5},
        {"expires": True},
        {"key": "sha256:" + "A" * 64},
        {"key": "0" * 64},
        {"attempt": 0},
        {"run": "a b"},
        {"site": "a\n"},
        {"offset": -1},
        {"offset": 2.0},
        {"seed": 1},
    ],
)
def test_a_seal_that_is_not_exactly_of_its_form_is_refused(changes: dict[str, object]) -> None:
    part = Part(site="a", study=DIGEST, run="r", name="x", offset=0, payload=DIGEST, **SEAL)
    values = json.loads(part.encode()) | changes
    with pytest.raises(MessageError):
        messages.decode_question(json.dumps(values).encode())


def test_what_is_said_of_a_bad_header_is_short_and_on_one_line() -> None:
    bad = "\x1b[31m\n" + "x" * 3000
    for values in ({"kind": bad}, {"kind": "release", bad: 1}, {"kind": "refusal", "code": bad}):
        with pytest.raises(MessageError) as told:
            messages.decode_answer(json.dumps(values).encode())
        text = str(told.value)
        assert len(text) < 4 * messages.MAX_TOLD
        assert text.isprintable()


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_question_or_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        messages.decode_question(data)

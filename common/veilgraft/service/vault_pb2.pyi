from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("header", "signature", "data", "size")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    signature: bytes
    data: bytes
    size: int
    def __init__(self, header: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., data: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("verb", "argument")
    VERB_FIELD_NUMBER: _ClassVar[int]
    ARGUMENT_FIELD_NUMBER: _ClassVar[int]
    verb: str
    argument: str
    def __init__(self, verb: _Optional[str] = ..., argument: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("json", "exit_code", "error")
    JSON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    json: str
    exit_code: int
    error: str
    def __init__(self, json: _Optional[str] = ..., exit_code: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

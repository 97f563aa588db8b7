"""Logs for people and programs: one line a record, whatever stands in it.

Only entry points call `configure`. A file is the part's own: it holds exceptions in full, which
may quote what depends on a record, so it is readable by its owner alone. A stream may be collected
by others (a container engine, a journal): there an exception is its class's name.
"""

import json
import logging
import os
import re
import time
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from veilgraft.errors import InputError

MAX_BYTES = 10 << 20
"""After so many a file is put aside, with a number behind its name."""
KEPT_FILES = 5

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
# Else a name that came from outside could pass for a line of its own, or paint a terminal.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NAME = "veilgraft"


def configure(target: Path | TextIO, level: int | str = logging.INFO, as_json: bool = True) -> None:
    """Send all log records of this process to a file, or to a stream such as stderr.

    What an earlier call set up is closed. One process writes a file: it is rotated.

    Args:
        target: a file, mode 0600, whose folder exists; or an open stream.
        as_json: JSON lines of `time` (UTC, ISO 8601, ms), `level`, `logger`, `message`, the
            record's extra fields and `exception`; or else text, without
            extra fields.

    Raises:
        InputError: the file can't be written, or there is no such level.
    """
    handler = _handler(target)
    form = _Json if as_json else _Text
    handler.setFormatter(form(whole=isinstance(target, Path)))
    handler.set_name(_NAME)
    root = logging.getLogger()
    try:
        root.setLevel(level)
    except ValueError:
        handler.close()
        raise InputError(f"log level: expected one such as INFO, got {level!r}") from None
    for old in [held for held in root.handlers if held.get_name() == _NAME]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)


def _handler(target: Path | TextIO) -> logging.Handler:
    if not isinstance(target, Path):
        return logging.StreamHandler(target)
    try:
        return _OwnFile(target, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{target}: can't be written: {error.strerror}") from None


class _OwnFile(RotatingFileHandler):
    """A file for its owner alone, also after it was rotated."""

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8")


class _Text(logging.Formatter):
    """A line a record; an exception's lines follow, set in."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, *, whole: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._whole = whole

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text, without control characters."""
        record.message = plain(record.getMessage())
        record.asctime = self.formatTime(record)
        text = self.formatMessage(record)
        exception = _exception(self, record, whole=self._whole)
        lines = exception.splitlines() if exception else []
        return "\n".join([text, *(f"    {plain(line)}" for line in lines)])


class _Json(_Text):
    """One JSON object a record, on one line of ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; what is none is shown as text."""
        facts: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        exception = _exception(self, record, whole=self._whole)
        if exception is not None:
            facts["exception"] = exception
        taken = _STANDARD | set(facts)
        extra = {name: value for name, value in vars(record).items() if name not in taken}
        try:
            return json.dumps({**facts, **extra}, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return json.dumps({**facts, **{name: repr(value) for name, value in extra.items()}})


def _exception(form: logging.Formatter, record: logging.LogRecord, *, whole: bool) -> str | None:
    if not record.exc_info or record.exc_info[0] is None:
        return None
    return form.formatException(record.exc_info) if whole else record.exc_info[0].__name__


def plain(text: str) -> str:
    """Return text with control characters escaped, so that it stays on its line."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)

"""Logs: one line a record."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilgraft import logs
from veilgraft.errors import InputError

log = logging.getLogger("veilgraft.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_record_is_a_json_line_with_time_level_logger_message_and_extra_fields(
    tmp_path: Path,
) -> None:
    logs.configure(tmp_path / "vault.log", "INFO", True)
    log.info("round %d", 3, extra={"study": "sha256:ab", "path": Path("x")})
    log.debug("not shown")
    (line,) = lines(tmp_path / "vault.log")
    assert list(line) == ["time", "level", "logger", "message", "study", "path"]
    assert line["message"] == "round 3"
    assert (line["level"], line["logger"]) == ("INFO", "veilgraft.test")
    written = datetime.fromisoformat(line["time"])
    assert line["time"][-5] == "." and line["time"].endswith("Z")
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)


@given(st.text())
def test_no_message_can_forge_a_line_or_move_a_cursor(text: str) -> None:
    for as_json in (True, False):
        stream = io.StringIO()
        logs.configure(stream, "INFO", as_json)
        log.info("refused: %s", text, extra={"site": text})
        written = stream.getvalue()
        assert written.endswith("\n")
        assert len(written.splitlines()) == 1
        assert not any(character in written[:-1] for character in "\x1b\n\r\0\u2028\u202e\x9b")
        if as_json:
            assert json.loads(written)["message"] == f"refused: {text}"
            assert json.loads(written)["site"] == text


@pytest.mark.parametrize("value", [float("nan"), {1: object()}, {(1, 2): 3}])
def test_an_extra_field_that_is_no_json_is_shown_as_text(tmp_path: Path, value: object) -> None:
    logs.configure(tmp_path / "vault.log", "INFO", True)
    log.info("odd", extra={"value": value, "level": "forged"})
    (line,) = lines(tmp_path / "vault.log")
    assert line["level"] == "INFO"
    assert line["message"] == "odd"


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exceptions_text_goes_into_the_own_file_and_to_no_stream(
    tmp_path: Path, as_json: bool
) -> None:
    path, stream = tmp_path / "vault.log", io.StringIO()
    for target in (path, stream):
        logs.configure(target, "INFO", as_json)
        try:
            raise ValueError("row 7\n2026-01-01 INFO forged: patient 12")
        except ValueError:
            log.exception("refused")
    text = path.read_text(encoding="utf-8")
    assert "patient 12" in text and "Traceback" in text
    assert not any(line.startswith("2026-01-01 INFO forged") for line in text.splitlines())
    if as_json:
        assert "patient 12" in lines(path)[0]["exception"]
    assert "ValueError" in stream.getvalue()
    assert "patient" not in stream.getvalue() and "row 7" not in stream.getvalue()


def test_a_second_call_takes_the_place_of_the_first(tmp_path: Path) -> None:
    logs.configure(tmp_path / "first.log", "INFO", True)
    logs.configure(tmp_path / "second.log", "WARNING", True)
    log.warning("once")
    log.info("not shown")
    assert lines(tmp_path / "first.log") == []
    assert [line["message"] for line in lines(tmp_path / "second.log")] == ["once"]


def test_files_are_their_owners_alone_and_rotate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 400)
    logs.configure(tmp_path / "vault.log", "INFO", True)
    for number in range(60):
        log.info("record %d", number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == logs.KEPT_FILES + 1
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    assert all(line["level"] == "INFO" for file in files for line in lines(file))
    assert lines(tmp_path / "vault.log")[-1]["message"] == "record 59"


def test_what_can_not_be_set_up_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/vault\.log: can't be written: No such file"):
        logs.configure(tmp_path / "none" / "vault.log", "INFO", True)
    with pytest.raises(InputError, match="log level: expected one such as INFO, got 'loud'"):
        logs.configure(tmp_path / "vault.log", "loud", True)

"""The event log."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from veilgraft.chain import Chain, ChainError, Schema
from veilgraft.events import MAX_FACTS, EventLog


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    made = EventLog(tmp_path / "state" / "events.db")
    yield made
    made.close()


def test_what_was_noted_is_there_in_order_with_its_facts_and_the_time(log: EventLog) -> None:
    log.note("joined", site="a")
    log.note("refused", code="unavailable", rounds=[1, None], kind="update")
    opened, joined, refused = log.entries()
    assert (opened.kind, opened.facts) == ("open", {"format": 1})
    assert (joined.seq, joined.kind, joined.facts) == (2, "joined", {"site": "a"})
    assert refused.facts == {"code": "unavailable", "rounds": [1, None], "kind": "update"}
    written = datetime.fromisoformat(refused.time)
    assert timedelta() <= datetime.now(UTC) - written < timedelta(minutes=1)


def test_a_log_goes_on_where_it_was_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    for _ in range(2):
        log = EventLog(path)
        log.note("started")
        log.close()
    assert path.stat().st_mode & 0o077 == 0
    log = EventLog(path, exists=True)
    assert [note.kind for note in log.entries()] == ["open", "started", "started"]
    assert log.verify(log.head()) == 3
    log.close()


@pytest.mark.parametrize(
    "facts",
    [
        {"path": Path("x")},
        {"epsilon": float("nan")},
        {"bytes": b"x"},
        {"reason": "x" * MAX_FACTS},
        {"time": "yesterday"},
    ],
)
def test_facts_that_are_no_small_plain_json_are_not_noted(
    log: EventLog, facts: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="facts: expected"):
        log.note("refused", **facts)
    assert [note.kind for note in log.entries()] == ["open"]


def test_threads_and_processes_share_one_log(log: EventLog) -> None:
    script = (
        "import sys; from pathlib import Path; from veilgraft.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]), exists=True)\n"
        "[log.note('answered', round=i) for i in range(20)]"
    )
    command = [sys.executable, "-c", script, str(log.path)]
    with subprocess.Popen(command) as other, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: log.note("answered", round=i), range(40)))
        assert other.wait(timeout=60) == 0
    assert log.verify() == 61


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET body = replace(body, 'unavailable', 'head-invalid') WHERE seq = 2",
        "UPDATE entries SET body = 'no JSON' WHERE seq = 2",
        "UPDATE entries SET kind = 'answered' WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries",
    ],
)
def test_verify_finds_what_was_changed(log: EventLog, change: str) -> None:
    log.note("refused", code="unavailable")
    log.note("stopped")
    raw = sqlite3.connect(log.path)
    raw.executescript(f"DROP TRIGGER no_update; DROP TRIGGER no_delete; {change};")
    raw.close()
    with pytest.raises(ChainError):
        log.verify()


def test_a_log_cut_short_fits_its_chain_and_not_its_anchor(log: EventLog) -> None:
    log.note("started")
    log.note("stopped")
    anchor = log.head()
    raw = sqlite3.connect(log.path)
    raw.executescript("DROP TRIGGER no_delete; DELETE FROM entries WHERE seq = 3;")
    raw.close()
    assert log.verify() == 2
    with pytest.raises(ChainError, match="the log was rolled back, or is another"):
        log.verify(anchor)


def test_a_log_that_can_not_be_written_says_so(log: EventLog) -> None:
    log.close()
    with pytest.raises(ChainError):
        log.note("stopped")


def test_another_schemas_file_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    Chain(path, schema=Schema(noun="ledger", format=2, kinds=("grant",))).close()
    with pytest.raises(ChainError, match="expected a log of format 1"):
        EventLog(path)


def test_text_of_any_kind_is_kept_as_it_came(log: EventLog) -> None:
    text = 'a"b\n\x1b[31m\u202e\ud800'
    log.note("refused-request", path=text)
    assert list(log.entries())[-1].facts == {"path": text}
    raw = sqlite3.connect(log.path)
    (body,) = raw.execute("SELECT body FROM entries WHERE seq = 2").fetchone()
    raw.close()
    assert body.isascii() and body.isprintable()
    assert json.loads(body)["path"] == text
    assert log.verify() == 2

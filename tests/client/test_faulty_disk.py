"""The faulty disk does to SQLite what it says, and no more."""

import random
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from tests.client.faulty_disk import Change, FaultyDisk, File, ProcessDied, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

COMMIT = 3
"""Operations of a commit of one page to a log: a frame's header, the page, and a sync."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    with FaultyDisk(tmp_path) as made:
        yield made


@pytest.fixture
def path(disk: FaultyDisk) -> Path:
    """A database with one row, 0, that is on the disk for good."""
    found = disk.folder / "rows.db"
    with closing(connect(found)) as connection:
        connection.execute("CREATE TABLE rows (value)")
        insert(connection, 0)
    return found


def connect(path: Path, synchronous: str = "FULL", journal: str = "WAL") -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


def insert(connection: sqlite3.Connection, value: object) -> None:
    connection.execute("INSERT INTO rows VALUES (?)", (value,))


def rows(connection: sqlite3.Connection) -> list[object]:
    return [value for (value,) in connection.execute("SELECT value FROM rows ORDER BY rowid")]


def held(path: Path) -> list[object]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return rows(connection)


def sizes(folder: Path) -> dict[str, bytes]:
    files = folder.glob("rows.db*")
    return {each.name: each.read_bytes() for each in files if not each.name.endswith("-shm")}


def everything_lost(n: int) -> int:
    """Of four fates of a file's unsynced changes, that none survives."""
    return 1 if n == 4 else 0


def everything_left(_: int) -> int:
    return 0


# What it counts.


def test_a_commit_to_the_log_is_a_frame_a_page_and_a_sync(disk: FaultyDisk, path: Path) -> None:
    with closing(connect(path)) as connection:
        insert(connection, 1)
        disk.counts.clear()
        insert(connection, 2)
        assert disk.counts == Counter(write=2, sync=1)
        connection.execute("PRAGMA synchronous = OFF")
        insert(connection, 3)
        assert disk.counts == Counter(write=4, sync=1)


def test_the_last_to_close_checkpoints_and_deletes_the_log(disk: FaultyDisk, path: Path) -> None:
    first, second = connect(path), connect(path)
    insert(first, 1)
    disk.counts.clear()
    second.close()
    assert disk.counts == Counter()
    first.close()
    assert disk.counts["delete"] == 1
    assert disk.counts["sync"] == 2
    assert sizes(disk.folder).keys() == {"rows.db"}


def test_files_elsewhere_and_connections_after_it_are_left_alone(
    disk: FaultyDisk, path: Path
) -> None:
    left = connect(path)
    disk.counts.clear()
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(folder + "/a")) as other:
        disk.cut()
        other.execute("CREATE TABLE rows (value)")
        insert(other, 1)
    assert disk.counts == Counter()
    disk.restart()
    disk.__exit__(None, None, None)
    with pytest.raises(sqlite3.OperationalError, match="no such vfs"):
        sqlite3.connect(f"file:{path}?vfs=faulty", uri=True)
    with closing(sqlite3.connect(path)) as connection:
        insert(connection, 1)
    left.close()
    disk.__enter__()
    assert disk.counts == Counter()


def test_two_disks_at_a_time_are_refused(disk: FaultyDisk, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="one faulty disk"), FaultyDisk(tmp_path):
        pass


# What it fails.


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(
    disk: FaultyDisk, path: Path
) -> None:
    with closing(connect(path)) as connection:
        disk.full(after=2, times=2)
        for value in (1, 2):
            with pytest.raises(sqlite3.OperationalError, match="disk is full"):
                insert(connection, value)
        assert not disk.armed
        assert rows(connection) == [0]
        insert(connection, 3)
    assert held(path) == [0, 3]


def test_a_failing_write_or_sync_fails_once(disk: FaultyDisk, path: Path) -> None:
    with closing(connect(path)) as connection:
        insert(connection, 1)
        for operation in range(1, COMMIT + 1):
            disk.io(operation)
            with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
                insert(connection, "lost")
            insert(connection, operation)
    assert held(path) == [0, 1, 1, 2, 3]


def test_a_fault_that_was_lifted_never_comes(disk: FaultyDisk, path: Path) -> None:
    with closing(connect(path)) as connection:
        disk.crash(1)
        disk.lift()
        insert(connection, 1)
    assert held(path) == [0, 1]


@pytest.mark.parametrize("after", range(1, COMMIT + 1))
def test_after_a_crash_nothing_is_written_not_even_by_closing(
    disk: FaultyDisk, path: Path, after: int
) -> None:
    connection = connect(path)
    insert(connection, 1)
    disk.crash(after)
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        insert(connection, 2)
    assert not disk.alive
    with pytest.raises(ProcessDied):
        disk.check_alive()
    found, operations = sizes(disk.folder), disk.counts.total()
    with pytest.raises(sqlite3.OperationalError):
        insert(connection, 3)
    connection.close()
    assert disk.counts.total() > operations
    assert sizes(disk.folder) == found
    assert found.keys() == {"rows.db", "rows.db-wal"}
    disk.restart()
    # The log was whole when the sync failed: unless the power fails, too, it is found.
    assert held(path) == ([0, 1, 2] if after == COMMIT else [0, 1])


def test_a_process_dies_alone_and_the_others_live_on(disk: FaultyDisk, path: Path) -> None:
    def die() -> None:
        connection = connect(path)
        connection.execute("BEGIN")
        insert(connection, "never")
        disk.crash(2, machine=False)
        with pytest.raises(sqlite3.OperationalError):
            connection.execute("COMMIT")
        died.append(not disk.alive)
        connection.close()

    died: list[bool] = []
    with closing(connect(path)) as survivor:
        victim = threading.Thread(target=die)
        victim.start()
        victim.join()
        assert died == [True]
        assert disk.alive
        insert(survivor, 1)
    assert held(path) == [0, 1]


@pytest.mark.parametrize("length", [0, 1, 512, 4095])
def test_a_torn_write_stores_its_first_bytes_and_is_found(
    disk: FaultyDisk, path: Path, length: int
) -> None:
    connection = connect(path)
    insert(connection, 1)
    before = len(sizes(disk.folder)["rows.db-wal"])
    disk.torn(2, length)
    with pytest.raises(sqlite3.OperationalError):
        insert(connection, 2)
    connection.close()
    frame = 24
    assert len(sizes(disk.folder)["rows.db-wal"]) == before + frame + length
    disk.restart()
    assert held(path) == [0, 1]


# What a loss of power leaves.


@pytest.mark.parametrize(("synchronous", "kept"), [("OFF", [0]), ("FULL", [0, 1])])
def test_a_commit_that_was_not_synced_is_lost_and_one_that_was_is_not(
    disk: FaultyDisk, path: Path, synchronous: str, kept: list[int]
) -> None:
    connection = connect(path, synchronous)
    insert(connection, 1)
    disk.cut()
    connection.close()
    disk.power_loss(everything_lost)
    assert held(path) == kept


def test_where_the_power_stays_nothing_written_is_lost(disk: FaultyDisk, path: Path) -> None:
    connection = connect(path, "OFF")
    insert(connection, 1)
    disk.cut()
    connection.close()
    disk.power_loss(everything_left)
    assert held(path) == [0, 1]


def some_fault(disk: FaultyDisk, draw: random.Random, deadly: bool) -> None:
    if deadly:
        draw.choice([disk.crash, lambda n: disk.torn(n, draw.randint(0, 4096))])(draw.randint(1, 9))
    else:
        draw.choice([disk.io, disk.full])(draw.randint(1, 9))


def commits_until_a_crash(disk: FaultyDisk, path: Path, draw: random.Random) -> list[object]:
    """Commit rows until a fault ends the machine, and the power with it; return the rows."""
    done: list[object] = []
    connection = connect(path)
    connection.execute("PRAGMA wal_autocheckpoint = 3")
    while disk.alive:
        if not disk.armed:
            some_fault(disk, draw, deadly=len(done) > 8)
        value = draw.random()
        with suppress(sqlite3.OperationalError):
            insert(connection, value)
            done.append(value)
    connection.close()
    disk.power_loss(draw.randrange)
    return done


@pytest.mark.parametrize("seed", range(60))
def test_a_synced_log_never_loses_a_commit_whatever_fails(
    disk: FaultyDisk, path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    kept: list[object] = [0]
    for _ in range(3):
        done = commits_until_a_crash(disk, path, draw)
        found = held(path)
        # A commit whose sync failed may be there all the same.
        assert [value for value in found if value in {*kept, *done}] == kept + done
        kept = found


def test_some_loss_of_power_tears_an_unsynced_log_in_the_middle(
    disk: FaultyDisk, path: Path
) -> None:
    found = set()
    for seed in range(80):
        connection = connect(path, "OFF")
        connection.execute("DELETE FROM rows")
        for value in range(4):
            insert(connection, value)
        disk.cut()
        connection.close()
        disk.power_loss(random.Random(seed).randrange)
        with closing(sqlite3.connect(path)) as again:
            found.add(len(rows(again)))
    assert 4 in found
    assert found & {2, 3}


@pytest.mark.parametrize(("synchronous", "kept"), [("FULL", [0]), ("EXTRA", [0, 1])])
def test_a_deleted_file_is_back_unless_its_folder_was_synced(
    disk: FaultyDisk, path: Path, synchronous: str, kept: list[int]
) -> None:
    # SQLite says so itself: without EXTRA, a rollback journal that comes back undoes a commit.
    connection = connect(path, synchronous, "DELETE")
    insert(connection, 1)
    disk.cut()
    connection.close()
    disk.power_loss(lambda n: 1 if n == 2 else 0)
    assert held(path) == kept


def test_a_truncation_that_was_synced_holds(disk: FaultyDisk, path: Path) -> None:
    # SQLite ends a commit by truncating the rollback journal; were it back, it would be undone.
    connection = connect(path, "FULL", "TRUNCATE")
    insert(connection, 1)
    disk.cut()
    connection.close()
    disk.power_loss(everything_left)
    assert sizes(disk.folder)["rows.db-journal"] == b""
    assert held(path) == [0, 1]


def test_what_a_sync_failed_on_is_promised_by_no_later_sync() -> None:
    file = File(bytearray(b"...."))
    file.changes.append(Change(0, b"a"))
    file.fail_sync()
    file.changes.append(Change(1, b"b"))
    file.sync()
    assert file.current() == b"ab.."
    assert file.after_power_loss(everything_lost) == b".b.."
    file.changes.append(Change(0, b"c"))
    file.sync()
    assert file.after_power_loss(everything_lost) == b"cb.."


@pytest.mark.parametrize("forgetful", [True, False])
def test_a_log_that_a_failed_sync_forgot_is_found_until_the_power_fails(
    disk: FaultyDisk, path: Path, forgetful: bool
) -> None:
    disk.forgetful = forgetful
    connection = connect(path)
    insert(connection, 1)
    disk.io(COMMIT)
    with pytest.raises(sqlite3.OperationalError):
        insert(connection, 2)
    disk.kill()
    connection.close()
    disk.restart()
    # SQLite takes the failed commit for a good one and goes on behind it.
    connection = connect(path)
    assert rows(connection) == [0, 1, 2]
    insert(connection, 3)
    disk.cut()
    connection.close()
    disk.power_loss(everything_lost)
    assert held(path) == ([0, 1] if forgetful else [0, 1, 2, 3])


def test_a_sync_in_which_its_process_dies_forgets_nothing(disk: FaultyDisk, path: Path) -> None:
    connection = connect(path)
    insert(connection, 1)
    disk.crash(COMMIT)
    with pytest.raises(sqlite3.OperationalError):
        insert(connection, 2)
    connection.close()
    disk.restart()
    connection = connect(path)
    insert(connection, 3)
    disk.cut()
    connection.close()
    disk.power_loss(everything_lost)
    assert held(path) == [0, 1, 2, 3]


def test_a_write_is_torn_at_a_sector_of_the_file_on_either_side() -> None:
    write = Change(500, b"x" * 600)
    parts = {
        (t.offset, len(t.data or b"")) for a in (0, 1) for b in (0, 1) for t in [tear(write, a, b)]
    }
    assert parts == {(500, 12), (500, 524), (512, 588), (1024, 76)}


def tear(write: Change, cut: int, side: int) -> Change:
    answers = iter((cut, side))
    return write.torn(lambda _: next(answers))


def test_a_write_behind_the_end_that_survives_alone_leaves_zeros_before_it() -> None:
    file = File(bytearray(b"ab"))
    file.changes += [Change(2, b"cd"), Change(4, b"ef"), Change(5, None)]
    answers = iter((3, 1, 0, 1))
    assert file.after_power_loss(lambda _: next(answers)) == b"ab\0\0ef"
    assert file.current() == b"abcde"


def test_the_first_few_changes_may_survive_and_a_part_of_the_next() -> None:
    file = File(bytearray())
    file.changes += [Change(0, b"a" * 512), Change(512, b"b" * 1024), Change(1536, b"c")]
    answers = iter((2, 1, 1, 0, 0))
    assert file.after_power_loss(lambda _: next(answers)) == b"a" * 512 + b"b" * 512

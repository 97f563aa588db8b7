"""What an event log says, for people and programs."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from veilgraft.chain import ChainError
from veilgraft.errors import InputError
from veilgraft.events import EventLog
from veilgraft_client.ledger import Ledger
from veilgraft_deploy import journal


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    with closing(EventLog(folder / "state" / "events.db")) as log:
        log.note("joined", site="a")
        log.note("refused", code="unavailable", text="\x1b[2J[red]\n\u202e")
    return folder


def test_a_folder_stands_for_the_log_in_it(site: Path, tmp_path: Path) -> None:
    at_site = journal.verify(site)
    assert at_site["entries"] == 3
    assert journal.verify(site / "state" / "events.db") == at_site
    with closing(EventLog(tmp_path / "coordinator" / "run" / "events.db")) as log:
        log.note("initialised")
    assert journal.verify(tmp_path / "coordinator")["entries"] == 2
    with closing(EventLog(tmp_path / "coordinator" / "events.db")) as log:
        log.note("invited", site="a")
    both = journal.verify(tmp_path / "coordinator")
    assert set(both) == {"events.db", "run/events.db"}
    with pytest.raises(InputError, match="is of one log"):
        journal.verify(tmp_path / "coordinator", "1:" + "0" * 64)


def test_an_anchor_shows_a_log_that_was_rolled_back(site: Path, tmp_path: Path) -> None:
    anchor = str(journal.verify(site)["head"])
    assert journal.verify(site, anchor)["head"] == anchor
    kept = tmp_path / "anchor"
    kept.write_text(f"{anchor}\n", encoding="utf-8")
    assert journal.verify(site, str(kept))["head"] == anchor
    with pytest.raises(ChainError, match="the log was rolled back"):
        journal.verify(site, "3:" + "0" * 64)
    with pytest.raises(InputError, match="--anchor: expected NUMBER:HASH"):
        journal.verify(site, "the last one")


def test_show_gives_every_entry_as_json(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal.show(site, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [entry["kind"] for entry in shown["entries"]] == ["open", "joined", "refused"]
    assert shown["entries"][1]["facts"] == {"site": "a"}
    assert shown["heads"]["state/events.db"] == journal.verify(site)["head"]


def test_show_prints_a_table_that_no_fact_can_paint(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.show(site, as_json=False)
    out = capsys.readouterr().out
    assert "joined" in out and "unavailable" in out and "[red]" in out
    assert not any(character in out for character in "\x1b\u202e")
    assert "head of state/events.db: 3:" in out


def test_what_is_no_log_is_said_in_one_sentence(site: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.db: expected an event log, found none"):
        journal.verify(tmp_path / "none.db")
    with pytest.raises(InputError, match=r"expected an event log, or a folder with"):
        journal.verify(tmp_path)
    Ledger(tmp_path / "ledger.db").close()
    with pytest.raises(InputError, match="expected a log of format 1"):
        journal.verify(tmp_path / "ledger.db")
    assert not (tmp_path / "none.db").exists()

"""What an event log says, for people and programs."""

import functools
import json
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from veilgraft.errors import InputError
from veilgraft.events import EventLog, Note
from veilgraft.logs import plain
from veilgraft_deploy.books import anchored, held

PLACES = ("state/events.db", "events.db", "run/events.db", "flower/edge-events.db")
"""Where a site's folder keeps its log; and a coordinator's its own, the run's and the edge's."""


def logs(path: Path) -> dict[str, Path]:
    """Return a log, or all that a site's or coordinator's folder holds, by name."""
    if not path.is_dir():
        return {path.name: path}
    found = {place: path / place for place in PLACES if (path / place).exists()}
    if not found:
        raise InputError(f"{path}: expected an event log, or a folder with {' or '.join(PLACES)}")
    return found


def _opened(path: Path) -> AbstractContextManager[EventLog]:
    return held(functools.partial(EventLog, exists=True), path, "an event log")


def verify(path: Path, anchor: str | None = None) -> dict[str, object]:
    """Check each log's chain, and that nothing was rolled back; return what is to be printed.

    Args:
        anchor: what `log verify` gave earlier as the head, or a file that holds it; for one log.

    Raises:
        ChainError: an entry does not fit the chain, or the anchor is not in it.
    """
    found = logs(path)
    if anchor is not None and len(found) > 1:
        raise InputError(f"--anchor: is of one log; name one of {', '.join(found)} in {path}")
    known = None if anchor is None else anchored(anchor)
    facts: dict[str, dict[str, object]] = {}
    for name, each in found.items():
        with _opened(each) as log:
            facts[name] = {"entries": log.verify(known), "head": log.head()}
    return dict(facts) if len(facts) > 1 else next(iter(facts.values()))


def show(path: Path, *, as_json: bool) -> None:
    """Print what was noted, oldest first; whether it is genuine, `verify` says."""
    found, heads = logs(path), {}
    notes: list[tuple[str, Note]] = []
    for name, each in found.items():
        with _opened(each) as log:
            notes += [(name, note) for note in log.entries()]
            heads[name] = log.head()
    # Of one log as they stand; clocks may jump.
    if len(found) > 1:
        notes.sort(key=lambda named: named[1].time)
    if as_json:
        entries = [{**asdict(note), "log": name} for name, note in notes]
        typer.echo(json.dumps({"entries": entries, "heads": heads}))
        return
    table = Table("time", "what", "facts")
    for _, note in notes:
        table.add_row(*(Text(text, overflow="fold") for text in _row(note)))
    console = Console()
    console.print(table)
    for name, head in heads.items():
        console.print(f"head of {name}: {head}", highlight=False, soft_wrap=True)


def _row(note: Note) -> tuple[str, str, str]:
    """Return a line's cells; text from outside stands as JSON, and can't paint the terminal."""
    facts = ", ".join(f"{plain(name)} {json.dumps(fact)}" for name, fact in note.facts.items())
    return plain(note.time), plain(note.kind), facts

"""What an event log says, for people and programs."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
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

PLACES = ("state/events.db", "run/events.db")
"""Where a site's folder and a coordinator's keep theirs."""


@contextmanager
def opened(path: Path) -> Iterator[EventLog]:
    """Open an existing log; a site's or coordinator's folder stands for the log in it."""
    if path.is_dir():
        found = [path / place for place in PLACES if (path / place).exists()]
        if len(found) != 1:
            raise InputError(f"{path}: expected one of {' and '.join(PLACES)}, found {len(found)}")
        path = found[0]
    with held(functools.partial(EventLog, exists=True), path, "an event log") as log:
        yield log


def verify(path: Path, anchor: str | None = None) -> dict[str, object]:
    """Check a log's chain, and that nothing was rolled back; return what is to be printed.

    Args:
        anchor: what `log verify` gave earlier as the head, or a file that holds it.

    Raises:
        ChainError: an entry does not fit the chain, or the anchor is not in it.
    """
    with opened(path) as log:
        known = None if anchor is None else anchored(anchor)
        return {"entries": log.verify(known), "head": log.head()}


def show(path: Path, *, as_json: bool) -> None:
    """Print what was noted, oldest first; whether it is genuine, `verify` says."""
    with opened(path) as log:
        notes, head = list(log.entries()), log.head()
    if as_json:
        typer.echo(json.dumps({"entries": [asdict(note) for note in notes], "head": head}))
        return
    table = Table("time", "what", "facts")
    for note in notes:
        table.add_row(*(Text(text, overflow="fold") for text in _row(note)))
    console = Console()
    console.print(table)
    console.print(f"chain's head: {head}", highlight=False, soft_wrap=True)


def _row(note: Note) -> tuple[str, str, str]:
    """Return a line's cells; text from outside stands as JSON, and can't paint the terminal."""
    facts = ", ".join(f"{plain(name)} {json.dumps(fact)}" for name, fact in note.facts.items())
    return plain(note.time), plain(note.kind), facts

"""What a ledger says, for people and programs."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from veilgraft.chain import ChainError
from veilgraft.errors import InputError
from veilgraft.events import EventLog
from veilgraft_client.ledger import Ledger

Book = TypeVar("Book", Ledger, EventLog)


@contextmanager
def opened(path: Path) -> Iterator[Ledger]:
    """Open an existing ledger; a run folder stands for the ledger in it."""
    path = path / "ledger.db" if path.is_dir() else path
    with held(functools.partial(Ledger, exists=True), path, "a ledger") as ledger:
        yield ledger


@contextmanager
def held(open_: Callable[[Path], Book], path: Path, noun: str) -> Iterator[Book]:
    """Open what is written on a chain, which must exist; it is closed at the end."""
    if not path.is_file():
        raise InputError(f"{path}: expected {noun}, found none")
    try:
        book = open_(path)
    except ChainError as error:
        raise InputError(str(error)) from None
    with closing(book):
        yield book


def anchored(text: str) -> str:
    """Return the anchor that `text` is, or that lies in the file it names."""
    form = re.compile(r"[1-9][0-9]*:[0-9a-f]{64}")
    given = text
    if not form.fullmatch(text):
        path = Path(text)
        given = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else text
    if not form.fullmatch(given.strip()):
        raise InputError(f"--anchor: expected NUMBER:HASH or a file that holds it, got {text!r}")
    return given.strip()


def show(path: Path, *, as_json: bool) -> None:
    """Print each site's studies, what was granted and spent, and the ε of it."""
    with opened(path) as ledger:
        rows = [row for site in ledger.sites() for row in _site(ledger, site)]
        lives = [_life(ledger, site) for site in ledger.sites()]
        head = ledger.head()
    if as_json:
        typer.echo(json.dumps({"sites": rows, "lives": lives, "head": head}, indent=2))
        return
    table = Table("site", "study", "granted", "spent", "ε of it", "ε of all", "δ")
    for row in rows:
        table.add_row(
            row["site"],
            row["study"][:19] + "…",
            str(row["granted"]),
            str(row["spent"]),
            _shown(row["epsilon"]),
            _shown(row["epsilon_of_all"]),
            f"{row['delta']:g}",
        )
    console = Console()
    console.print(table)
    console.print(_table_of(lives))
    console.print(f"chain's head: {head}", highlight=False, soft_wrap=True)


def _site(ledger: Ledger, site: str) -> Iterator[dict[str, Any]]:
    for grant in [entry for entry in ledger.entries(site) if entry.kind == "grant"]:
        delta = grant.body["delta"]
        events = ledger.events(site, grant.study)
        yield {
            "site": site,
            "study": grant.study,
            "granted": sum(each["count"] for each in grant.body["releases"].values()),
            "spent": len(events),
            "events": [asdict(event) if event else None for event in events],
            "epsilon": _finite(ledger.epsilon(site, delta, study=grant.study)),
            "epsilon_of_all": _finite(ledger.epsilon(site, delta)),
            "delta": delta,
        }


def _life(ledger: Ledger, site: str) -> dict[str, Any]:
    """Return what is held against a site's cap, however studies were chosen."""
    terms = ledger.terms(site)
    return {
        "site": site,
        "epsilon": _finite(ledger.life_epsilon(site)),
        "max_epsilon": terms.max_epsilon,
        "delta": ledger.life_delta(site),
        "held_out": terms.held_out,
        "unit": terms.unit,
    }


def _table_of(lives: list[dict[str, Any]]) -> Table:
    table = Table("site", "unit", "ε for life, of all granted", "cap", "δ for life", "held out")
    table.caption = (
        "For life: also where a study was chosen in the light of earlier results. "
        "Above, settings count as fixed in advance."
    )
    for life in lives:
        table.add_row(
            life["site"],
            life["unit"],
            _shown(life["epsilon"]),
            "none" if life["max_epsilon"] is None else f"{life['max_epsilon']:g}",
            f"{life['delta']:g}",
            f"{life['held_out']:g}",
        )
    return table


def _finite(epsilon: float) -> float | None:
    return None if epsilon == float("inf") else epsilon


def _shown(epsilon: object) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.4f}"

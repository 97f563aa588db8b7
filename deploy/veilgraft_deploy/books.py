"""What a ledger says, for people and programs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from veilgraft.errors import InputError
from veilgraft_client.ledger import Ledger, LedgerError


@contextmanager
def opened(path: Path) -> Iterator[Ledger]:
    """Open an existing ledger; a run folder stands for the ledger in it."""
    path = path / "ledger.db" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: expected a ledger, found none")
    try:
        ledger = Ledger(path, exists=True)
    except LedgerError as error:
        raise InputError(str(error)) from None
    try:
        yield ledger
    finally:
        ledger.close()


def show(path: Path, *, as_json: bool) -> None:
    """Print each site's studies, what was granted and spent, and the ε of it."""
    with opened(path) as ledger:
        rows = [row for site in ledger.sites() for row in _site(ledger, site)]
        head = ledger.head()
    if as_json:
        typer.echo(json.dumps({"sites": rows, "head": head}, indent=2))
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
    console.print(f"chain's head: {head}", highlight=False, soft_wrap=True)


def _site(ledger: Ledger, site: str) -> Iterator[dict[str, Any]]:
    for grant in [entry for entry in ledger.entries(site) if entry.kind == "grant"]:
        delta = grant.body["delta"]
        events = ledger.events(site, grant.study)
        yield {
            "site": site,
            "study": grant.study,
            "granted": grant.body["rounds"],
            "spent": len(events),
            "events": [asdict(event) if event else None for event in events],
            "epsilon": _finite(ledger.epsilon(site, delta, study=grant.study)),
            "epsilon_of_all": _finite(ledger.epsilon(site, delta)),
            "delta": delta,
        }


def _finite(epsilon: float) -> float | None:
    return None if epsilon == float("inf") else epsilon


def _shown(epsilon: object) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.4f}"

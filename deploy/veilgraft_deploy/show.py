"""How the command line prints facts: as lines for people, or as JSON."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from veilgraft import logs

AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            typer.echo(f"{key}:")
            for each in value:
                typer.echo("".join(f"  {line}\n" for line in _lines(each)))
        else:
            typer.echo(f"{key}: {plain(value)}")


def _lines(facts: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {plain(value)}" for name, value in facts.items()]


def plain(value: object) -> str:
    """Return a value as a person reads it."""
    match value:
        case None | () | []:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float() if value > 1e-3:
            return f"{value:.4f}"
        case dict() if value:
            return ", ".join(f"{name} {plain(each)}" for name, each in value.items())
        case dict():
            return "none"
        case list() | tuple():
            return ", ".join(map(plain, value))
        case _:
            # A study's words are its coordinator's, and must not paint the terminal.
            return logs.plain(str(value))

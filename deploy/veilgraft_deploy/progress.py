"""How a simulation tells what it is doing: to nobody, or drawn live with rich."""

from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from veilgraft_server.checkpoint import Round


class Watcher(Protocol):
    """Is told how a simulation goes on."""

    def say(self, text: str) -> None:
        """One sentence."""

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """So much of `what` is done."""


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """Say nothing."""


class Live:
    """Draws a bar for each thing under way; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one sentence above the bars."""
        self._progress.console.print(text, highlight=False)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of `what`."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._tasks[what], completed=done, total=total, note=note)


def noted(round_: Round) -> str:
    """Return a round's accuracy and ε for its bar."""
    shown = []
    if round_.accuracy is not None:
        about = "accuracy ≈" if round_.low is not None else "accuracy"
        shown.append(f"{about} {round_.accuracy:.3f}")
    shown.append("not private" if round_.epsilon is None else f"ε {round_.epsilon:.2f}")
    return "  ".join(shown)


def table(report: dict[str, Any]) -> Table:
    """Return a run's results as a table: the federation first, then the comparisons."""
    final, comparisons = report["final"], report["comparisons"] or {}
    shown = Table(
        title=f"{report['study']['name']}: accuracy on {_where(report)}", title_justify="left"
    )
    shown.add_column("")
    shown.add_column("accuracy", justify="right")
    shown.add_column("ε per site", justify="right")
    spent = {site["epsilon"] for site in report["sites"]}
    epsilon = "no bound" if None in spent else f"{max(spent):.3f}"
    name = "private federation" if report["private"] else f"federation ({_why(report)})"
    shown.add_row(name, _percent(final["accuracy"], final["accuracy_interval"]), epsilon)
    rows = {
        "one_site_alone": ("one site alone, same budget", epsilon),
        "no_transfer": ("no transfer, same budget", epsilon),
        "no_privacy": ("no privacy", "no bound"),
    }
    for key, (text, price) in rows.items():
        if key in comparisons:
            shown.add_row(text, _percent(comparisons[key]), price)
    if report["private"]:
        shown.caption = (
            f"ε at δ = {final['delta']:g}, add or remove one unit; replacing one: "
            f"{final['epsilon_replace_one']:.2f}"
        )
    return shown


def _why(report: dict[str, Any]) -> str:
    return "not private: seeded" if report["seeded"] else "not private: no noise"


def _where(report: dict[str, Any]) -> str:
    noised = any(round_["low"] is not None for round_ in report["rounds"])
    return "held-out units at the sites, noised" if noised else "public records"


def _percent(accuracy: float | None, interval: list[float] | None = None) -> str:
    if accuracy is None:
        return "not shown"
    if interval is None:
        return f"{accuracy:.3f}"
    return f"{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"

"""What a sweep leaves: a report, a table of its trials, and accuracy drawn against ε."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from veilgraft.durable import write_atomically
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_server.checkpoint import Round

_NAMES = {
    "learning_rate": "learning rate",
    "rounds": "rounds",
    "clip_norm": "clip norm",
    "sample_rate": "sample rate",
}


@dataclass(frozen=True)
class Trial:
    """One federation that was run: the study of a point, and one seed.

    Attributes:
        seed: None where the noise was fresh.
        seconds: from its first ledger entry to its last round.
    """

    study: Study
    seed: int | None
    history: tuple[Round, ...]
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """Its line in `sweep.csv`: values of the point, then what came of them."""
        last = self.history[-1]
        return {
            **_values(self.study),
            "epsilon_spent": last.epsilon,
            "seed": self.seed,
            "accuracy": last.accuracy,
            "loss": last.loss,
            "seconds": round(self.seconds, 3),
        }


def report(study: Study, trials: Sequence[Trial], timing: Mapping[str, float]) -> dict[str, Any]:
    """Return the report of a sweep whose trials come point by point.

    `points` are in the grid's order, each with the mean over its seeds and the sample standard
    deviation, None where there is one; `best` holds for each ε the point with the highest mean.
    What was seeded is not private, which `private` says; `epsilon_spent` is then what the same
    study would spend unseeded.
    """
    grid = study.simulation.grid
    points = [_point(list(alike)) for _, alike in groupby(trials, lambda t: t.study.digest)]
    return {
        "study": {"name": study.name, "digest": study.digest},
        "private": not grid.seeds,
        "seeded": bool(grid.seeds),
        "grid": {key: values for key, values in grid.model_dump(mode="json").items() if values},
        "delta": study.privacy.delta,
        "points": points,
        "best": _best(points),
        "timing": dict(timing),
    }


def write(folder: Path, content: dict[str, Any], trials: Sequence[Trial]) -> None:
    """Write all files, each atomically; `report.json` comes last, and only beside the others."""
    lines = [trial.facts for trial in trials]
    write_atomically(folder / "sweep.csv", _csv(lines))
    shown = ("round", "accuracy", "loss", "epsilon", "sites", "dropped", "seconds")
    rounds = [
        {**_values(trial.study), "seed": trial.seed}
        | {"epsilon_so_far" if k == "epsilon" else k: asdict(round_)[k] for k in shown}
        for trial in trials
        for round_ in trial.history
    ]
    write_atomically(folder / "rounds.csv", _csv(rounds))
    write_atomically(folder / "sweep.png", _drawn(content))
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", text.encode())


def table(content: dict[str, Any]) -> Table:
    """Return all points as a table, with the best of each ε marked."""
    shown = Table(title=f"{content['study']['name']}: accuracy over the grid", title_justify="left")
    keys = _varied(content)
    for name in ("ε", *(_NAMES[key] for key in keys), "accuracy"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for point in content["points"]:
        values = [f"{point['epsilon_spent']:.3f}", *(f"{point[key]:g}" for key in keys)]
        best = point in content["best"]
        shown.add_row(*values, _spread(point), "best" if best else "", style="bold" * best)
    seeds = content["grid"].get("seeds")
    runs = f"mean ± deviation over {len(seeds)} seeds" if seeds else "one run each"
    shown.caption = f"ε at δ = {content['delta']:g}, add or remove one unit; {runs}"
    return shown


def _values(study: Study) -> dict[str, float | None]:
    training, privacy = study.training, study.privacy
    return {
        "epsilon": privacy.epsilon,
        "learning_rate": training.learning_rate,
        "rounds": training.rounds,
        "clip_norm": privacy.clip_norm,
        "sample_rate": training.sample_rate,
    }


def _point(trials: Sequence[Trial]) -> dict[str, Any]:
    study = trials[0].study
    last = [trial.history[-1] for trial in trials]
    accuracies = [each.accuracy for each in last if each.accuracy is not None]
    losses = [each.loss for each in last if each.loss is not None]
    return {
        **_values(study),
        "epsilon_spent": last[0].epsilon,
        "noise_multiplier": plan(study).sigma,
        "digest": study.digest,
        "trials": len(trials),
        "accuracy": statistics.fmean(accuracies) if accuracies else None,
        "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "loss": statistics.fmean(losses) if losses else None,
    }


def _best(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    scored = [point for point in points if point["accuracy"] is not None]
    alike = groupby(sorted(scored, key=_epsilon), _epsilon)
    return [max(group, key=lambda point: float(point["accuracy"])) for _, group in alike]


def _epsilon(point: dict[str, Any]) -> float:
    # Where the study names its noise, points of equal ε differ in the last digits.
    return float(point["epsilon"] or f"{point['epsilon_spent']:.6g}")


def _varied(content: dict[str, Any]) -> list[str]:
    """Return the keys that tell the points of one ε apart; the learning rate always."""
    return [
        key for key in _NAMES if key == "learning_rate" or len(content["grid"].get(key, ())) > 1
    ]


def _spread(point: dict[str, Any]) -> str:
    if point["accuracy"] is None:
        return "not known"
    deviation = point["accuracy_deviation"]
    return f"{point['accuracy']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _drawn(content: dict[str, Any]) -> bytes:
    """Return a PNG of accuracy against ε, a line for each learning rate (and what else varies)."""
    # A second of imports, for this alone; and no pyplot, which keeps state and seeks a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, line in _lines(content):
        deviations = [point["accuracy_deviation"] or 0.0 for point in line]
        axes.errorbar(
            [point["epsilon_spent"] for point in line],
            [point["accuracy"] for point in line],
            yerr=deviations if any(deviations) else None,
            marker="o",
            capsize=3,
            label=label,
        )
    ticks = sorted({_epsilon(point) for point in content["points"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"ε at δ = {content['delta']:g}")
    axes.set_ylabel("accuracy")
    axes.set_title(content["study"]["name"])
    axes.grid(alpha=0.3)
    if axes.containers:
        axes.legend()
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=150)
    return made.getvalue()


def _lines(content: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    keys = _varied(content)
    scored = [point for point in content["points"] if point["accuracy"] is not None]

    def values(point: dict[str, Any]) -> tuple[float, ...]:
        return tuple(point[key] or 0.0 for key in keys)

    for found, line in groupby(sorted(scored, key=lambda p: (values(p), _epsilon(p))), values):
        label = ", ".join(
            f"{_NAMES[key]} {value:g}" for key, value in zip(keys, found, strict=True)
        )
        yield label, list(line)

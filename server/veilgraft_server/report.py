"""What a run leaves for people and programs: `report.json` and `rounds.csv`."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veilgraft.durable import write_atomically
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_server.checkpoint import Progress


def report(
    study: Study,
    progress: Progress,
    *,
    seeded: bool,
    sites: Sequence[dict[str, Any]],
    comparisons: dict[str, float | None] | None,
    timing: dict[str, float],
) -> dict[str, Any]:
    """Return the report; a figure that has no bound or was not measured is None.

    `private` is true only where nothing was seeded and every release was noised.
    """
    planned, history = plan(study), progress.history
    last = history[-1]
    return {
        "study": {"name": study.name, "digest": study.digest},
        "private": study.private and not seeded,
        "seeded": seeded,
        "algorithm": study.training.algorithm,
        "noise_multiplier": planned.sigma if study.private else None,
        "rounds": [asdict(round_) for round_ in history],
        "final": {
            "accuracy": last.accuracy,
            "loss": last.loss,
            "accuracy_interval": None if last.low is None else [last.low, last.high],
            "epsilon": planned.epsilon(last.round),
            "epsilon_replace_one": planned.epsilon(last.round, replace_one=True),
            "delta": study.privacy.delta if study.private else None,
        },
        "label_counts": _by_label(study, progress.labels),
        "comparisons": comparisons,
        "sites": list(sites),
        "timing": timing,
    }


def _by_label(
    study: Study, labels: Mapping[str, list[float]] | None
) -> dict[str, dict[str, float]] | None:
    """Return each site's noised counts by the labels' names."""
    if labels is None:
        return None
    names = study.task.labels
    return {site: dict(zip(names, counts, strict=True)) for site, counts in labels.items()}


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write `report.json` and `rounds.csv`, each atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", text.encode())
    table = io.StringIO()
    columns = [
        "private",
        "round",
        "accuracy",
        "low",
        "high",
        "loss",
        "epsilon",
        "sites",
        "dropped",
        "seconds",
    ]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"private": content["private"], **row} for row in content["rounds"])
    write_atomically(folder / "rounds.csv", table.getvalue().encode())


def statement(
    study: Study,
    *,
    seed: int | None = None,
    seeded: Sequence[str] = (),
    reduced: Sequence[str] = (),
) -> Sequence[str]:
    """Return the privacy statement of what a run made, a sentence a line.

    Args:
        seed: from which all noise came, in a simulation.
        seeded: sites whose noise came from a seed.
        reduced: sites whose vault did not stand apart in full.
    """
    planned = plan(study)
    if not study.private:
        return ["**Not private.** Trained without clipping and noise."]
    if seed is not None:
        return [f"**Not private.** The noise came from a seed, {seed}, and can be subtracted."]
    if seeded:
        return [
            f"**Not private.** The noise of {', '.join(seeded)} came from a seed, and can be "
            "subtracted."
        ]
    unit = "record"
    if study.privacy.column is not None:
        unit = f"unit, all rows with one value of `{study.privacy.column}`,"
    said = [
        f"Each {unit} at each site is protected by (ε, δ)-differential privacy with "
        f"ε = {planned.epsilon():.4g} at δ = {planned.delta:g} (add or remove one unit; "
        f"{planned.epsilon(replace_one=True):.4g} for replacing one), over all "
        f"{planned.rounds} rounds{_measured(study)}.",
        f"Algorithm `{study.training.algorithm}`, noise multiplier {planned.sigma:.4g}, clip norm "
        f"{study.privacy.clip_norm:g}; no trust in the coordinator is needed for this.",
        "A unit that is present at several sites spends at each of them; budgets add.",
    ]
    if reduced:
        said.append(
            f"Reduced isolation at {', '.join(reduced)}: there, the process with the data was not "
            "kept apart in full from the one with the network."
        )
    return said


def _measured(study: Study) -> str:
    asked = study.evaluation
    named = {"noised evaluation": asked.private, "noised label counts": asked.label_counts}
    told = [name for name, each in named.items() if each is not None]
    return f", {' and '.join(told)} included" if told else ""

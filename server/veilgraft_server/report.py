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

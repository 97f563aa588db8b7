"""What a simulation costs, against the number of sites, records, dimensions and rounds.

Each point is a process of its own: random features, DP-SGD with ten local steps of sample rate .1,
the in-process engine, everything but the backbone. `--headline` times 500,000 private steps, with
`--engine ray` on Ray; processor time and memory are then those of the first process alone.
Prints a table with the slope of each line on log-log axes, and draws docs/scale.png.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLOT = ROOT / "docs" / "scale.png"
BASE = {"sites": 100, "records": 100, "dimension": 384, "rounds": 5}
LINES: dict[str, list[int]] = {
    "sites": [10, 100, 1000, 10_000],
    "records": [100, 1000, 4000],
    "dimension": [64, 256, 1024, 4096],
    "rounds": [5, 50, 200],
}
HEADLINE = {"sites": 1000, "records": 100, "dimension": 384, "rounds": 50}
LABELS = 10


def main() -> None:
    """Measure all points, or run one."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--point", type=json.loads)
    options.add_argument("--headline", action="store_true")
    options.add_argument("--engine", choices=["inprocess", "ray"], default="inprocess")
    options.add_argument("--most", type=int, default=10_000, help="sites at most")
    chosen = options.parse_args()
    if chosen.point:
        print(json.dumps(_run(**chosen.point)))
    elif chosen.headline:
        print(json.dumps(_measured({**HEADLINE, "engine": chosen.engine})))
    else:
        _all(chosen.most)


def _all(most: int) -> None:
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, values in LINES.items():
        found[name] = []
        for value in values:
            if name == "sites" and value > most:
                continue
            point = _measured({**BASE, name: value})
            found[name].append((value, point["seconds"], point["peak_mib"]))
            print(f"{name:<10}{value:>7}{point['seconds']:>10.2f} s{point['peak_mib']:>8.0f} MiB")
        print(f"{name:<10}  slope {_slope(found[name]):.2f}")
    _draw(found)


def _measured(point: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _slope(points: list[tuple[int, float, float]]) -> float:
    """Return the slope between the last two points, where fixed costs weigh least."""
    (x, y, _), (u, v, _) = points[-2:]
    return math.log(v / y) / math.log(u / x)


def _run(
    sites: int, records: int, dimension: int, rounds: int, engine: Any = "inprocess"
) -> dict[str, float]:
    import resource

    from veilgraft_deploy.federation import Run, federate

    study = _study(sites, rounds)
    with tempfile.TemporaryDirectory() as folder:
        population = _population(study, sites, records, dimension, Path(folder))
        run = Run(study, Path(folder) / "out", Path(folder) / "state", engine=engine)
        run.out.mkdir()
        started, used = time.perf_counter(), time.process_time()
        federate(run, population)
        seconds = time.perf_counter() - started
        ledger = run.ledger.stat().st_size / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "peak_mib": peak, "ledger_mib": ledger}


def _study(sites: int, rounds: int) -> Any:
    from veilgraft.study import Study

    values = {
        "name": "scale",
        "purpose": "Time many sites.",
        "task": {"labels": [str(label) for label in range(LABELS)]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": 1.0},
        "training": {
            "algorithm": "dp-sgd",
            "rounds": rounds,
            "learning_rate": 0.5,
            "sample_rate": 0.1,
            "local_epochs": 1,
        },
        "aggregation": {"quorum": sites},
        "simulation": {"data": {"source": "digits"}, "data_is_public": True, "sites": sites},
    }
    return Study.parse(values, name="scale")


def _population(study: Any, sites: int, records: int, dimension: int, state: Path) -> Any:
    import torch

    from veilgraft.model import exact
    from veilgraft.model.features import Features
    from veilgraft_client.policy import Site
    from veilgraft_deploy.custody import declared
    from veilgraft_deploy.population import Population

    count, drawn = sites * records, torch.Generator().manual_seed(0)
    values = torch.empty(count, 1, dimension)
    for part in torch.split(values, 2**16):
        part.copy_(
            torch.from_numpy(exact.rounded(torch.randn(part.shape, generator=drawn).numpy()))
        )
    targets = torch.randint(LABELS, (count, 1), generator=drawn)
    features = Features(values, torch.ones(count, 1, dtype=torch.bool), targets)
    own = tuple(
        Site(
            site=f"site-{index + 1}",
            data=study.simulation.data[0],
            units=records,
            limits=declared(study).limits,
            data_is_public=True,
            state=state,
        )
        for index in range(sites)
    )
    bounds = tuple(range(0, count + 1, records))
    return Population(features, bounds, bounds[1:], own, features.select(torch.arange(100)))


def _draw(found: dict[str, list[tuple[int, float, float]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(13, 3.2), sharey=True, layout="tight")
    for plot, (name, points) in zip(axes, found.items(), strict=True):
        at, seconds, _ = zip(*points, strict=True)
        plot.loglog(at, seconds, "o-", color="#1f5f8b")
        scaled = [seconds[-1] * value / at[-1] for value in at]
        plot.loglog(at, scaled, ":", color="#999999", label="slope 1")
        plot.set_xlabel(name)
        plot.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    others = ", ".join(f"{value} {name}" for name, value in BASE.items())
    figure.suptitle(f"Simulating: {others}, but one ({os.cpu_count()} cores)", fontsize=10)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()

"""Time the reference job as a user runs it: whole commands, features made each time.

Prints medians of five: wall seconds, seconds a round, peak memory, and the ratio of a round to a
bare loop of the same arithmetic, measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REFERENCE = Path(__file__).with_name("reference.yaml")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--backbone", type=Path)
    chosen = options.parse_args()
    found = [_run(chosen.backbone) for _ in range(chosen.runs)]
    columns = ("wall s", "import s", "features s", "round s", "peak MiB", "round / bare loop")
    for name, values in zip(columns, zip(*found, strict=True), strict=True):
        spread = f"({min(values):.3f} to {max(values):.3f})"
        print(f"{name:<18}{statistics.median(values):>10.3f}  {spread}")


def _run(backbone: Path | None) -> tuple[float, float, float, float, float, float]:
    veilgraft = Path(sys.executable).with_name("veilgraft")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [str(veilgraft), "simulate", str(REFERENCE), "--out", str(out), "--json"]
        command += ["--backbone", str(backbone)] if backbone else []
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if status:
            raise SystemExit(f"the reference job failed with status {status}")
    print(f"ε {report['final']['epsilon']:.2f}, accuracy {report['final']['accuracy']:.3f}")
    seconds = statistics.median(round_["seconds"] for round_ in report["rounds"])
    timing = report["timing"]
    peak = usage.ru_maxrss / 1024
    return wall, timing["import"], timing["features"], seconds, peak, seconds / _bare_loop()


def _bare_loop(sites: int = 10, records: int = 150, dim: int = 256, labels: int = 10) -> float:
    """Return the seconds that a round's arithmetic takes without any framework."""
    torch.set_num_threads(1)
    values = torch.randn(sites, records, dim, dtype=torch.float64)
    targets = torch.eye(labels, dtype=torch.float64)[torch.randint(labels, (sites, records))]
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for x, y in zip(values, targets, strict=True):
            head = torch.zeros(labels, dim, dtype=torch.float64)
            for _ in range(5):
                taken = torch.rand(records) < 0.2
                batch = x[taken]
                residual = (batch @ head.T).softmax(1) - y[taken]
                norms = batch.norm(dim=1) * residual.norm(dim=1)
                clipped = residual * (1 / norms).clamp(max=1)[:, None]
                noised = clipped.T @ batch + torch.randn(labels, dim, dtype=torch.float64)
                head -= 0.5 / 30 * noised
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()

"""Run the demo ten times, unseeded, and print what it promises beside what was seen."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "common" / "privacy"))
import independent_pricer  # type: ignore[import-not-found]

RUNS = 10


def main() -> int:
    """Print the table; exit 1 where a promise does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        found = [_run(Path(folder) / f"demo-{index}") for index in range(RUNS)]
    accuracies = [report["final"]["accuracy"] for report, _, _ in found]
    rows = [
        ("mean private accuracy", statistics.mean(accuracies), ">=", 0.92),
        ("lowest private accuracy", min(accuracies), ">=", 0.89),
        ("mean above no transfer", _lead(found, "no_transfer"), ">=", 0.04),
        ("mean above one site alone", _lead(found, "one_site_alone"), ">=", 0.12),
        ("mean below no privacy", -_lead(found, "no_privacy"), "", None),
        ("longest run, seconds", max(seconds for _, seconds, _ in found), "<=", 60.0),
        ("largest error of ε, share", max(error for _, _, error in found), "<=", 0.01),
    ]
    good = True
    for name, value, relation, bound in rows:
        holds = bound is None or (value >= bound if relation == ">=" else value <= bound)
        good &= holds
        promise = f"{relation} {bound}" if bound is not None else ""
        print(f"{name:<28}{value:>9.4f}  {promise:<9} {'' if holds else 'FAILS'}")
    print("private accuracies: " + " ".join(f"{value:.3f}" for value in sorted(accuracies)))
    return 0 if good else 1


def _run(out: Path) -> tuple[dict[str, Any], float, float]:
    veilgraft = Path(sys.executable).with_name("veilgraft")
    started = time.perf_counter()
    subprocess.run([veilgraft, "demo", "--out", out], check=True, capture_output=True, timeout=600)
    seconds = time.perf_counter() - started
    report = json.loads((out / "report.json").read_text())
    shown = subprocess.run(
        [veilgraft, "ledger", "show", out, "--json"], check=True, capture_output=True, timeout=60
    )
    first = json.loads(shown.stdout)["sites"][0]
    events = [(e["noise_multiplier"], e["sample_rate"], e["steps"]) for e in first["events"]]
    independent = independent_pricer.epsilon(events, first["delta"])
    return report, seconds, abs(report["final"]["epsilon"] / independent - 1)


def _lead(found: list[tuple[dict[str, Any], float, float]], name: str) -> float:
    leads = [float(r["final"]["accuracy"] - r["comparisons"][name]) for r, _, _ in found]
    return statistics.mean(leads)


if __name__ == "__main__":
    sys.exit(main())

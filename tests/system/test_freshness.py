"""No two releases share noise: seen from outside, in what the ledgers hold."""

import itertools
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.system.command import veilgraft, written

VEILGRAFT = Path(sys.executable).with_name("veilgraft")
BOUND = 180
SIGMA = 50.0


def releases(out: Path) -> list[np.ndarray]:
    ledger = sqlite3.connect(out / "state" / "ledger.db")
    payloads = [row[0] for row in ledger.execute("SELECT bytes FROM payloads")]
    ledger.close()
    arrays = [safetensors.numpy.load(payload) for payload in payloads]
    return [np.concatenate([a.ravel() for _, a in sorted(each.items())]) for each in arrays]


@pytest.mark.ray
def test_no_two_releases_share_noise_over_rounds_sites_restarts_and_engines(tmp_path: Path) -> None:
    study = written(
        tmp_path,
        privacy={"epsilon": None, "noise_multiplier": SIGMA},
        training={"rounds": 3},
        # A public run lets releases go; this one's ledger keeps them for life.
        simulation={"sites": 3, "data_is_public": False, "units": 400, "holdout": 0.2},
        aggregation={"quorum": 3},
    )

    def flags(name: str) -> list[str | Path]:
        return ["--out", tmp_path / name / "out", "--state", tmp_path / name / "state"]

    for name in ("one", "again"):
        done = veilgraft("simulate", study, *flags(name))
        assert done.returncode == 0, done.stderr
    process = subprocess.run(
        list(map(str, [VEILGRAFT, "simulate", study, *flags("ray"), "--engine", "ray"])),
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert process.returncode == 0, process.stderr
    found = [each for name in ("one", "again", "ray") for each in releases(tmp_path / name)]
    assert len(found) == 3 * 3 * 3
    # Independent vectors of 650 numbers have a cosine of .04 by chance; six times that is .24.
    # What the records add to it is below (sites' sums / noise)² = (266 / 1,275)² = .05.
    units = [each / np.linalg.norm(each) for each in found]
    cosines = [abs(float(a @ b)) for a, b in itertools.combinations(units, 2)]
    assert max(cosines) < 0.29

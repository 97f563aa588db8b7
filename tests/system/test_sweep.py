"""`veilgraft simulate --grid` as a user runs it, on the demo's digits."""

import csv
import json
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.system.command import one_sentence, report_of, veilgraft, written

from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.study import Study
from veilgraft_deploy.sweep import points, sweep

EPSILONS, RATES, SEEDS = [1.0, 3.0], [0.5, 2.0], [0, 5]
GRID = {"epsilon": EPSILONS, "learning_rate": RATES, "seeds": SEEDS}


def swept(folder: Path, grid: dict[str, Any] = GRID, **sections: dict[str, Any]) -> Path:
    simulation = {"grid": grid, **sections.pop("simulation", {})}
    training = {"rounds": 2, **sections.pop("training", {})}
    return written(folder, simulation=simulation, training=training, **sections)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, state: Path) -> Path:
    """The folder of one sweep of two ε, two rates and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    done = veilgraft("simulate", swept(folder), "--grid", "--out", folder / "out", "--state", state)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("±") == 5
    assert done.stdout.count("best") == 2
    return folder / "out"


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_writes_a_line_for_each_point_and_seed(out: Path) -> None:
    found = [
        (float(line["epsilon"]), float(line["learning_rate"]), int(line["seed"]))
        for line in lines(out / "sweep.csv")
    ]
    assert found == [(e, rate, seed) for e in EPSILONS for rate in RATES for seed in SEEDS]
    for line in lines(out / "sweep.csv"):
        assert float(line["epsilon_spent"]) == pytest.approx(float(line["epsilon"]), rel=1e-6)
        assert (line["rounds"], line["clip_norm"]) == ("2", "1.0")
        assert float(line["seconds"]) > 0
    assert len(lines(out / "rounds.csv")) == 2 * len(found)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "points").exists()


def test_the_report_holds_mean_and_deviation_and_the_best_of_each_epsilon(out: Path) -> None:
    report, rows = report_of(out), lines(out / "sweep.csv")
    assert report["private"] is False
    for index, point in enumerate(report["points"]):
        scores = [float(row["accuracy"]) for row in rows[2 * index : 2 * index + 2]]
        assert point["accuracy"] == pytest.approx(statistics.fmean(scores))
        assert point["accuracy_deviation"] == pytest.approx(statistics.stdev(scores))
    assert [point["epsilon"] for point in report["best"]] == EPSILONS
    for best in report["best"]:
        rivals = [p["accuracy"] for p in report["points"] if p["epsilon"] == best["epsilon"]]
        assert best["accuracy"] == max(rivals)


def test_a_point_equals_a_plain_run_of_its_study_and_seed(
    out: Path, state: Path, tmp_path: Path
) -> None:
    study = swept(tmp_path, {}, privacy={"epsilon": 1.0}, training={"learning_rate": 2.0})
    flags = ("--out", tmp_path / "run", "--state", state, "--seed", 5, "--json")
    plain = json.loads(veilgraft("simulate", study, *flags).stdout)
    [point] = [
        p for p in report_of(out)["points"] if (p["epsilon"], p["learning_rate"]) == (1.0, 2.0)
    ]
    assert point["digest"] == plain["study"]["digest"]
    assert point["noise_multiplier"] == plain["noise_multiplier"]
    mine = [row for row in lines(out / "rounds.csv") if row["seed"] == "5"]
    mine = [row for row in mine if (row["epsilon"], row["learning_rate"]) == ("1.0", "2.0")]
    assert [float(row["accuracy"]) for row in mine] == [r["accuracy"] for r in plain["rounds"]]
    assert [float(row["loss"]) for row in mine] == [r["loss"] for r in plain["rounds"]]
    assert [float(row["epsilon_so_far"]) for row in mine] == [r["epsilon"] for r in plain["rounds"]]


def test_without_seeds_each_point_is_run_once_and_privately(state: Path, tmp_path: Path) -> None:
    study = swept(tmp_path, {"clip_norm": [0.5, 1.0]})
    flags = ("--grid", "--out", tmp_path / "out", "--state", state, "--json")
    done = veilgraft("simulate", study, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == report_of(tmp_path / "out")
    assert report["private"] is True
    assert [point["clip_norm"] for point in report["points"]] == [0.5, 1.0]
    assert {point["accuracy_deviation"] for point in report["points"]} == {None}
    assert len(report["best"]) == 1


def test_a_grid_replaces_the_noise_that_a_study_names(tmp_path: Path) -> None:
    path = swept(tmp_path, {"epsilon": [2.0], "rounds": [3, 4]})
    study = Study.read(path)
    named = study.model_copy(
        update={
            "privacy": study.privacy.model_copy(update={"epsilon": None, "noise_multiplier": 9.0})
        }
    )
    found = points(named)
    assert [(p.privacy.epsilon, p.training.rounds) for p in found] == [(2.0, 3), (2.0, 4)]
    assert {p.privacy.noise_multiplier for p in found} == {None}


def test_a_refusal_passes_from_one_process_to_another() -> None:
    there = pickle.loads(pickle.dumps(RefusedError(Refusal.UNAVAILABLE, "over budget")))
    assert (there.code, there.detail, str(there)) == (Refusal.UNAVAILABLE, *["over budget"] * 2)


def test_a_value_that_no_study_can_have_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"simulation\.grid: training: .*no sample_rate"):
        points(Study.read(swept(tmp_path, {"sample_rate": [0.5]})))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--compare", "expected no --compare"),
        ("--resume", "a sweep that was stopped starts again, with --overwrite"),
        ("--seed=3", "name seeds in simulation.grid.seeds"),
    ],
)
def test_a_sweep_is_neither_compared_nor_resumed_nor_seeded(
    tmp_path: Path, option: str, expected: str
) -> None:
    done = veilgraft("simulate", swept(tmp_path), "--grid", "--out", tmp_path / "out", option)
    one_sentence(done, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "expected", "code"),
    [
        (
            {"simulation": {"data_is_public": False, "units": 80, "holdout": 0}},
            "private records would have to pay",
            3,
        ),
        ({"simulation": {"grid": {}}}, "simulation.grid: expected values", 2),
        ({"simulation": {"grid": {"seeds": [1]}}}, "simulation.grid: expected values", 2),
        (
            {"simulation": {"grid": {"epsilon": [1.0, 1.0]}}},
            "simulation.grid.epsilon: expected each value once",
            2,
        ),
        (
            {"simulation": {"grid": {"seeds": [-1]}}},
            "simulation.grid.seeds.0: expected a number of at least 0",
            2,
        ),
        ({"simulation": {"max_epsilon": 2.0}}, "simulation.max_epsilon: 2; a point", 2),
        ({"simulation": {"holdout": 0}}, "no record is left to measure", 2),
    ],
)
def test_a_sweep_that_cannot_be_run_is_one_sentence_and_runs_nothing(
    tmp_path: Path, state: Path, sections: dict[str, Any], expected: str, code: int
) -> None:
    study, out = swept(tmp_path, **sections), tmp_path / "out"
    flags = ("--grid", "--out", out, "--state", state)
    one_sentence(veilgraft("simulate", study, *flags), expected, code)
    assert not out.exists()


def test_a_sweep_replaces_another_only_if_asked_and_leaves_no_part_of_it(
    out: Path, state: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    study = swept(tmp_path, {"learning_rate": [1.0]}, training={"rounds": 1})
    command = ("simulate", study, "--grid", "--out", folder, "--state", state)
    one_sentence(veilgraft(*command), "holds a run; give --overwrite")
    plain = veilgraft("simulate", study, "--out", folder, "--state", state, "--overwrite")
    assert plain.returncode == 0, plain.stderr
    assert not (folder / "sweep.csv").exists()
    assert veilgraft(*command, "--overwrite").returncode == 0
    assert not (folder / "model").exists()
    assert len(lines(folder / "sweep.csv")) == 1


def test_a_killed_sweep_leaves_no_process_and_started_again_finds_what_one_process_finds(
    out: Path, state: Path, tmp_path: Path
) -> None:
    # So many that two processes share them, and that some are left when the first has begun.
    seeds = [*SEEDS, *range(10, 22)]
    study, folder = swept(tmp_path, {**GRID, "seeds": seeds}), tmp_path / "out"
    command = ("simulate", study, "--grid", "--out", folder, "--state", state)
    name = Path(sys.executable).with_name("veilgraft")
    process = subprocess.Popen(list(map(str, [name, *command])), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob("points/*/ledger.db")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert (folder / "run.json").exists()
    assert not (folder / "report.json").exists()
    while _working_in(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    report = sweep(Study.read(study), out=folder, state=state, workers=2, overwrite=True)
    assert [point["trials"] for point in report["points"]] == [len(seeds)] * 4
    again = [row for row in lines(folder / "sweep.csv") if int(row["seed"]) in SEEDS]
    for one, other in zip(again, lines(out / "sweep.csv"), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}
    assert not (folder / "points").exists()


def _working_in(folder: Path) -> list[int]:
    """Processes that hold a file in a folder open, or have one mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [str(each.readlink()) for each in (process / "fd").iterdir()]
            held.append((process / "maps").read_text())
        except OSError:
            continue
        if any(str(folder) in each for each in held):
            found.append(int(process.name))
    return found

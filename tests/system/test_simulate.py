"""`veilgraft simulate` as a user runs it: whole commands, real apps, real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.system.command import DEMO, one_sentence, report_of, veilgraft, written

from veilgraft_client.ledger import Ledger

VEILGRAFT = Path(sys.executable).with_name("veilgraft")
BOUND = 180
"""Seconds after which any command here has hung."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of features for all tests here, so that they are made once."""
    return tmp_path_factory.mktemp("state")


def test_a_study_runs_from_records_to_model_and_says_what_it_spent(
    tmp_path: Path, state: Path
) -> None:
    out = tmp_path / "run"
    done = veilgraft("simulate", written(tmp_path), "--out", out, "--state", state, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == report_of(out)
    assert report["private"] is True
    assert report["seeded"] is False
    assert report["comparisons"] is None
    assert [r["round"] for r in report["rounds"]] == [1, 2, 3, 4]
    assert [r["sites"] for r in report["rounds"]] == [10] * 4
    assert report["final"]["epsilon"] == pytest.approx(3.0, rel=1e-6)
    assert report["final"]["epsilon_replace_one"] == pytest.approx(6.706, rel=1e-3)
    assert {site["units"] for site in report["sites"]} == {80}
    for site in report["sites"]:
        assert site["epsilon"] == pytest.approx(3.0, rel=1e-6)
    assert (out / "rounds.csv").read_text().count("\n") == 5
    assert "ε = 3 at δ = 1e-05" in (out / "model" / "README.md").read_text()


SPARED = """
import sys
from veilgraft_deploy.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
spared = {"datasets", "flwr_datasets", "matplotlib", "opacus", "pandas", "ray", "sklearn"}
print(sorted(spared & set(sys.modules)))
"""


def test_a_simulation_imports_no_library_that_it_has_no_work_for(
    tmp_path: Path, state: Path
) -> None:
    """Each would take up to two seconds, and 30 MiB and more; imports are most of a short run."""
    arguments = ["simulate", written(tmp_path), "--out", tmp_path / "run", "--state", state]
    command = [sys.executable, "-c", SPARED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_seed_makes_the_run_reproducible_and_not_private(tmp_path: Path, state: Path) -> None:
    study, heads = written(tmp_path), []
    for name in ("one", "two"):
        out = tmp_path / name
        done = veilgraft("simulate", study, "--out", out, "--state", state, "--seed", 7, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["private"] is False
        assert report["seeded"] is True
        assert "Not private" in (out / "model" / "README.md").read_text()
        settings = json.loads((out / "model" / "config.json").read_text())
        assert settings["veilgraft"]["private"] is False
        assert {site["epsilon"] for site in report["sites"]} == {None}
        assert "\nFalse,1," in (out / "rounds.csv").read_text()
        heads.append(load_file(out / "model" / "head.safetensors"))
    for name, array in heads[0].items():
        assert np.array_equal(array, heads[1][name])


def test_two_unseeded_runs_differ(tmp_path: Path, state: Path) -> None:
    study, heads = written(tmp_path), []
    for name in ("one", "two"):
        veilgraft("simulate", study, "--out", tmp_path / name, "--state", state)
        heads.append(load_file(tmp_path / name / "model" / "head.safetensors"))
    assert not np.array_equal(heads[0]["linear0.weight"], heads[1]["linear0.weight"])


@pytest.mark.ray
def test_both_engines_agree_at_equal_seeds(tmp_path: Path, state: Path) -> None:
    study = written(
        tmp_path,
        training={"algorithm": "dp-sgd", "rounds": 2, "sample_rate": 0.5, "local_epochs": 1},
        simulation={"sites": 5},
        aggregation={"quorum": 5},
    )
    heads = []
    for engine in ("inprocess", "ray"):
        out = tmp_path / engine
        flags = ["--out", out, "--state", state, "--seed", "3", "--engine", engine]
        # A process of its own: Ray leaves threads and warnings behind.
        done = subprocess.run(
            list(map(str, [VEILGRAFT, "simulate", study, *flags])),
            capture_output=True,
            text=True,
            timeout=BOUND,
        )
        assert done.returncode == 0, done.stderr
        heads.append(load_file(out / "model" / "head.safetensors"))
    assert list(state.glob("population*")) == []
    for name, array in heads[0].items():
        np.testing.assert_allclose(array, heads[1][name], rtol=1e-9)


@pytest.mark.parametrize("kill_after", [0, 3, 9])
def test_a_killed_run_goes_on_and_pays_no_round_twice(
    tmp_path: Path, state: Path, kill_after: int
) -> None:
    study = written(tmp_path, training={"rounds": 12})
    out = tmp_path / "run"
    arguments = ("simulate", study, "--out", out, "--state", state, "--json")
    process = subprocess.Popen(
        [str(VEILGRAFT), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + BOUND
    while _rounds_paid(out) < kill_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=BOUND)
    done = veilgraft(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [r["round"] for r in report["rounds"]] == list(range(1, 13))
    assert report["final"]["epsilon"] == pytest.approx(3.0, rel=1e-6)
    ledger = Ledger(out / "ledger.db")
    ledger.verify(let_go=True)
    for site in report["sites"]:
        assert len(ledger.events(site["site"])) == 12
        assert site["epsilon"] == pytest.approx(3.0, rel=1e-6)
    ledger.close()


def _rounds_paid(out: Path) -> int:
    """Count rounds by the size of the growing write-ahead log, without touching the ledger."""
    checkpoint = out / "checkpoint.safetensors"
    if not checkpoint.exists():
        return 0
    return checkpoint.read_bytes().count(b'\\"round\\"') - 1


def test_a_finished_run_resumed_says_the_same_again(tmp_path: Path, state: Path) -> None:
    arguments = ("simulate", written(tmp_path), "--out", tmp_path / "run", "--state", state)
    assert veilgraft(*arguments).returncode == 0
    first = report_of(tmp_path / "run")
    assert veilgraft(*arguments, "--resume").returncode == 0
    again = report_of(tmp_path / "run")
    assert {**again, "timing": None} == {**first, "timing": None}


def test_a_run_is_not_overwritten_unasked_nor_resumed_as_another(
    tmp_path: Path, state: Path
) -> None:
    study, out = written(tmp_path), tmp_path / "run"
    arguments = ("simulate", study, "--out", out, "--state", state)
    assert veilgraft(*arguments).returncode == 0
    before = (out / "ledger.db").read_bytes()
    again = veilgraft(*arguments)
    assert again.returncode == 2
    assert "holds a run; give --resume" in again.stderr
    other = veilgraft(*arguments, "--resume", "--seed", 1)
    assert other.returncode == 2
    assert "is not the one with which this run was started" in other.stderr
    assert (out / "ledger.db").read_bytes() == before
    assert veilgraft(*arguments, "--overwrite").returncode == 0


def test_a_run_whose_ledger_or_records_were_lost_is_not_resumed(
    tmp_path: Path, state: Path
) -> None:
    study, out = written(tmp_path), tmp_path / "run"
    arguments = ("simulate", study, "--out", out, "--state", state)
    assert veilgraft(*arguments).returncode == 0
    for path in out.glob("ledger.db*"):
        path.unlink()
    lost = veilgraft(*arguments, "--resume")
    assert lost.returncode == 1
    assert "the ledger is missing" in lost.stderr
    (out / "records.hmac").write_text("0" * 64)
    other = veilgraft(*arguments, "--resume")
    assert other.returncode == 2
    assert "the records are not those" in other.stderr


@pytest.mark.parametrize("partition", [{"by": "dirichlet", "alpha": 0.3}, {"by": "iid"}])
def test_label_skew_and_an_even_split_both_run(
    tmp_path: Path, state: Path, partition: dict[str, Any]
) -> None:
    study = written(tmp_path, simulation={"partition": partition, "sites": 5})
    out = tmp_path / "run"
    done = veilgraft("simulate", study, "--out", out, "--state", state, "--sites", 10)
    assert done.returncode == 0, done.stderr
    sizes = {site["units"] for site in report_of(out)["sites"]}
    assert (len(sizes) == 1) == (partition["by"] == "iid")


def test_no_network_is_needed_and_nothing_is_left_outside_the_run_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    probe = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine lets nobody unshare the network namespace")
    study, out = written(tmp_path / "study"), tmp_path / "run"
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(home)}
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        ["unshare", "-rn", str(VEILGRAFT), "simulate", str(study), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=BOUND,
        env=environment,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert [path for path in left if not path.is_relative_to(out)] == []
    features = [path for path in left if path.suffix == ".npy"]
    assert len(features) == 1
    assert features[0].stat().st_mode & 0o077 == 0
    assert features[0].is_relative_to(out / "state")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": ({"privacy": {"epsilom": 1}}, "privacy.epsilom: unknown key"),
    "a negative ε": ({"privacy": {"epsilon": -3}}, "privacy.epsilon: expected a number above 0"),
    "another backbone": (
        {"backbone": {"digest": "sha256:" + "0" * 64}},
        "backbone.digest: expected sha256:0000",
    ),
    "no backbone": ({"backbone": {"path": "nowhere"}}, "nowhere: "),
    "too many sites": ({"simulation": {"sites": 5000}}, "simulation.sites: 5000 sites, but only"),
    "a quorum beyond the sites": (
        {"aggregation": {"quorum": 11}},
        "aggregation.quorum: expected at most 10, the number of sites, got 11",
    ),
    "a weight for nobody": (
        {"aggregation": {"weights": {"site-1": 1, "nobody": 2}}},
        "aggregation.weights: expected site-1",
    ),
    "text for a switch": (
        {"simulation": {"data_is_public": "yes"}},
        'simulation.data_is_public: expected boolean, got "yes"',
    ),
    "rounds without end": ({"training": {"rounds": 10**9}}, "training.rounds: expected a number"),
    "an impossible ε": (
        {"privacy": {"epsilon": 1e-12, "delta": 1e-9}},
        "privacy.epsilon: an ε of 1e-12 over 4 steps",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_study_is_one_sentence_and_spends_nothing(
    tmp_path: Path, state: Path, name: str
) -> None:
    sections, expected = MISTAKES[name]
    out = tmp_path / "run"
    done = veilgraft("simulate", written(tmp_path, **sections), "--out", out, "--state", state)
    one_sentence(done, expected)
    assert not (out / "ledger.db").exists()


def _table(text: str) -> Any:
    def write(path: Path) -> Path:
        file = path / "records.csv"
        file.write_text(text)
        return file

    return write


def _without_column(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b"x"], "label": ["1"]}), path / "records.parquet")
    return path / "records.parquet"


def _truncated(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / "records.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 50, "label": ["1"] * 50}), file)
    file.write_bytes(file.read_bytes()[:-40])
    return file


def _broken_image(path: Path) -> Path:
    folder = path / "images"
    for label in "01":
        (folder / label).mkdir(parents=True)
        (folder / label / "a.png").write_bytes(b"\x89PNG no image")
    return folder


DATA: dict[str, tuple[Any, str]] = {
    "a missing column": (_without_column, "'image'"),
    "a table in place of images": (_table("image,label\nx,1\n"), "expected a Parquet file"),
    "an empty file": (_table(""), "records.csv"),
    "only a header": (_table("image,label\n"), "records.csv"),
    "a truncated Parquet": (_truncated, "records.parquet"),
    "a broken image": (_broken_image, "a.png"),
    "no file": (lambda path: path / "records.csv", "records.csv"),
}


@pytest.mark.parametrize("name", DATA)
def test_a_mistake_in_the_data_is_one_sentence_and_spends_nothing(
    tmp_path: Path, name: str
) -> None:
    make, expected = DATA[name]
    out = tmp_path / "run"
    data = make(tmp_path)
    study = written(tmp_path / "study", simulation={"data": {"path": str(data)}})
    one_sentence(veilgraft("simulate", study, "--out", out), expected)
    assert not (out / "ledger.db").exists()


def test_an_unknown_label_is_one_sentence_and_spends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "eleven"
    folder.mkdir(parents=True)
    shutil.copyfile(DEMO / "study.yaml", folder / "a.png")
    study = written(tmp_path / "study", simulation={"data": {"path": str(folder.parent)}})
    one_sentence(veilgraft("simulate", study, "--out", tmp_path / "run"), "eleven")

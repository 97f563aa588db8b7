"""Records that nobody declared public, and units that are persons, as a user meets them."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.system.command import DEMO, one_sentence, report_of, veilgraft, written

from veilgraft.plan import plan
from veilgraft.study import DataSource, Study, Task
from veilgraft_client import dataset
from veilgraft_client.ledger import Ledger, Terms
from veilgraft_client.policy import Site

ROWS_OF_A_PERSON = 3
LABELS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 600 digits, three in a row one person's, with ids that are written in two ways."""
    digits = dataset.read(DataSource(source="digits"), Task(labels=tuple(LABELS)), modality="image")
    table = digits.table.slice(0, 600)
    people = [f"{' ' if i % 2 else ''}{i // ROWS_OF_A_PERSON:03d}" for i in range(600)]
    columns = {"image": table["input"].cast(pa.binary()), "label": table["label"], "person": people}
    path = tmp_path_factory.mktemp("data") / "records.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Path:
    """A state folder that holds these records' features, to be copied: a ledger is for life."""
    folder = tmp_path_factory.mktemp("features")
    study = private(folder / "study", records)
    done = veilgraft("simulate", study, "--out", folder / "run", "--state", folder / "state")
    assert done.returncode == 0, done.stderr
    return folder / "state" / "features"


@pytest.fixture
def state(tmp_path: Path, features: Path) -> Path:
    folder = tmp_path / "state"
    shutil.copytree(features, folder / "features")
    return folder


def private(folder: Path, records: Path, **sections: dict[str, Any]) -> Path:
    simulation = {
        "data": {"path": str(records)},
        "data_is_public": False,
        "sites": 4,
        "units": 150,
        "holdout": 0.25,
        **sections.pop("simulation", {}),
    }
    aggregation = {"quorum": 4, **sections.pop("aggregation", {})}
    return written(folder, simulation=simulation, aggregation=aggregation, **sections)


PERSON = {"unit": "person", "max_instances": 2}
MEASURED = {"private": {"share": 0.3, "every": 3}, "label_counts": {"share": 0.1}}


@pytest.mark.parametrize("head", [{"type": "linear"}, {"type": "mlp", "hidden": [8]}])
def test_private_records_spend_from_one_ledger_for_life(
    tmp_path: Path, records: Path, state: Path, head: dict[str, Any]
) -> None:
    study = private(tmp_path, records, head=head)
    arguments = ("simulate", study, "--state", state, "--out")
    assert veilgraft(*arguments, tmp_path / "one").returncode == 0
    report = report_of(tmp_path / "one")
    assert report["final"]["accuracy"] is None
    assert {round_["loss"] for round_ in report["rounds"]} == {None}
    assert {site["units"] for site in report["sites"]} == {150}
    assert not (tmp_path / "one" / "ledger.db").exists()
    # The same study again, from another folder: the stored bytes, and no ε.
    assert veilgraft(*arguments, tmp_path / "two").returncode == 0
    again = report_of(tmp_path / "two")
    assert again["sites"] == report["sites"]
    heads = [(tmp_path / run / "model" / "head.safetensors").read_bytes() for run in ("one", "two")]
    assert heads[0] == heads[1]


def test_another_study_on_the_same_records_meets_the_cap_and_only_a_person_raises_it(
    tmp_path: Path, records: Path, state: Path
) -> None:
    first = private(tmp_path / "first", records)
    assert veilgraft("simulate", first, "--state", state, "--out", tmp_path / "1").returncode == 0
    changes = {"training": {"rounds": 3}}
    second = private(tmp_path / "second", records, **changes)
    command = ("simulate", second, "--state", state, "--out", tmp_path / "2")
    one_sentence(veilgraft(*command), "all granted studies would come to ε = 4.6", code=3)
    ledger = Ledger(state / "ledger.db")
    assert len(ledger.events("site-1")) == 4
    ledger.close()
    asking = private(tmp_path / "asking", records, simulation={"max_epsilon": 8.0}, **changes)
    refused = veilgraft("simulate", asking, "--state", state, "--out", tmp_path / "3")
    one_sentence(refused, "a person may change the file")
    custody = state / "private.yaml"
    custody.write_text(re.sub("max_epsilon: .*", "max_epsilon: 8.0", custody.read_text()))
    done = veilgraft(*command, "--json")
    assert done.returncode == 0, done.stderr
    for site in json.loads(done.stdout)["sites"]:
        assert 3.0 < site["epsilon"] < site["life_epsilon"] < 8.0
        # The cap was raised once, and a second filter began.
        assert site["life_delta"] == pytest.approx(4e-5)
    shown = json.loads(veilgraft("ledger", "show", state, "--json").stdout)
    assert {life["max_epsilon"] for life in shown["lives"]} == {8.0}
    assert len(shown["sites"]) == 8


FIXED: dict[str, tuple[dict[str, Any], str]] = {
    "more sites": ({"simulation": {"sites": 5}}, "sites: fixed as 4 by the first run"),
    "another size": ({"simulation": {"units": 140}}, "units: fixed as 150"),
    "another share": ({"simulation": {"holdout": 0.5}}, "held_out: fixed as 0.25"),
    "another unit": (
        {"privacy": {"unit": "person", "max_instances": 2}}, "sources: fixed as [{name: records.pa",
    ),
    "another file": ({"simulation": {"data": {"path": "other.parquet"}}}, "this one says [{name"),
    "public after all": ({"simulation": {"data_is_public": True}}, "holds the ledger of pr"),
}  # fmt: skip


def test_what_the_first_run_over_private_records_fixed_holds_for_life(
    tmp_path: Path, records: Path, state: Path
) -> None:
    first = private(tmp_path, records)
    assert veilgraft("simulate", first, "--state", state, "--out", tmp_path / "1").returncode == 0
    before = (state / "ledger.db").read_bytes()
    for name, (sections, expected) in FIXED.items():
        changed = private(tmp_path / name, records, training={"rounds": 2}, **sections)
        refused = veilgraft("simulate", changed, "--state", state, "--out", tmp_path / "2")
        one_sentence(refused, expected)
    assert (state / "ledger.db").read_bytes() == before
    (state / "private.yaml").unlink()
    one_sentence(
        veilgraft("simulate", first, "--state", state, "--out", tmp_path / "2"),
        "private.yaml: missing beside the ledger that it belongs to",
    )


def test_a_private_ledger_is_never_in_a_folder_that_can_be_overwritten(
    tmp_path: Path, records: Path, state: Path
) -> None:
    study = private(tmp_path, records)
    for out in (state, state / "run", tmp_path):
        refused = veilgraft("simulate", study, "--state", state, "--out", out)
        one_sentence(refused, "--state: expected a folder apart from the run folder")
    assert veilgraft("simulate", study, "--state", state, "--out", tmp_path / "1").returncode == 0
    public = written(tmp_path / "public")
    one_sentence(veilgraft("simulate", public, "--out", state, "--overwrite"), "private records")
    other = private(tmp_path / "other", records, training={"rounds": 2})
    command = ("simulate", other, "--state", state, "--out", tmp_path / "1", "--overwrite")
    one_sentence(veilgraft(*command), "over budget", code=3)
    ledger = Ledger(state / "ledger.db")
    assert len(ledger.events("site-1")) == 4
    ledger.close()


def test_private_accuracy_and_label_counts_are_noised_and_inside_epsilon(
    tmp_path: Path, records: Path, state: Path
) -> None:
    study = private(tmp_path, records, evaluation=MEASURED)
    out = tmp_path / "run"
    done = veilgraft("simulate", study, "--state", state, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "accuracy on held-out units at the sites, noised" in done.stdout
    report = report_of(out)
    assert [round_["accuracy"] is None for round_ in report["rounds"]] == [True, True, False, False]
    low, high = report["final"]["accuracy_interval"]
    assert 0 <= low <= report["final"]["accuracy"] <= high <= 1
    assert low < high
    for site in report["sites"]:
        assert site["epsilon"] == pytest.approx(3.0, rel=1e-6)
    counts = report["label_counts"]
    assert sorted(counts) == ["site-1", "site-2", "site-3", "site-4"]
    assert all(list(each) == LABELS for each in counts.values())
    assert any(value != round(value) for each in counts.values() for value in each.values())
    ledger = Ledger(state / "ledger.db")
    kinds = [e.body["release"] for e in ledger.entries("site-1") if e.kind == "reserve"]
    ledger.close()
    assert kinds.count("update") == 4
    assert kinds.count("evaluation") == 2
    assert kinds.count("label-counts") == 1
    told = (out / "model" / "README.md").read_text()
    assert "noised evaluation and noised label counts included" in told
    # A run that is over says it all again.
    assert veilgraft("simulate", study, "--state", state, "--out", out, "--resume").returncode == 0
    assert {**report_of(out), "timing": None} == {**report, "timing": None}


def test_without_noise_the_sums_are_those_of_the_units_held_out(
    tmp_path: Path, records: Path, state: Path
) -> None:
    """On public records, where one may look: a quarter is held out, and label counts add up."""
    study = private(
        tmp_path,
        records,
        simulation={"data_is_public": True, "units": None},
        privacy={"epsilon": None},
        training={"algorithm": "none"},
        evaluation=MEASURED,
    )
    done = veilgraft("simulate", study, "--state", state, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    units = [site["units"] for site in report["sites"]]
    assert units == [150] * 4
    assert [sum(counts.values()) for counts in report["label_counts"].values()] == units
    low, high = report["final"]["accuracy_interval"]
    # Wilson's interval around .9 is .1 wide for about 150 units.
    assert 0.02 < high - low < 0.2
    assert report["final"]["accuracy"] > 0.7


def test_a_person_is_the_unit(tmp_path: Path, records: Path, state: Path) -> None:
    public = {"data_is_public": True, "units": None}
    study = private(tmp_path, records, privacy=PERSON, simulation=public)
    out = tmp_path / "run"
    done = veilgraft("simulate", study, "--state", state, "--out", out)
    assert done.returncode == 0, done.stderr
    report = report_of(out)
    # 200 persons, a quarter of them held out, on four sites.
    assert sorted(site["units"] for site in report["sites"]) == [37, 37, 38, 38]
    assert report["final"]["accuracy"] is not None
    card = (out / "model" / "README.md").read_text()
    assert "all rows with one value of `person`" in card


def test_a_person_s_features_are_padded_to_the_study_s_width_and_private_persons_stay_together(
    tmp_path: Path, records: Path, state: Path
) -> None:
    study = private(tmp_path, records, privacy={**PERSON, "max_instances": 5}, evaluation=MEASURED)
    done = veilgraft("simulate", study, "--state", state, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ledger = Ledger(state / "ledger.db")
    assert len(ledger.events("site-4")) == 4 + 2 + 1
    assert ledger.terms("site-4").held_out == 0.25
    assert ledger.terms("site-4").unit == "person, as text"
    ledger.close()


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str, int]] = {
    "no size": ({"simulation": {"units": None}}, [], "simulation.units: missing", 2),
    "a split by all labels": (
        {"simulation": {"partition": {"by": "dirichlet"}}}, [], "a split by dirichlet depends", 2,
    ),
    "a split by a column": (
        {"simulation": {"partition": {"by": "column", "column": "person"}}},
        [],
        "a split by column depends on all records",
        2,
    ),
    "comparisons": ({}, ["--compare"], "comparisons train without privacy", 3),
    "a seed": ({}, ["--seed", "1"], "gives no privacy", 3),
    "a count to hold out": (
        {"simulation": {"holdout": 30}, "evaluation": MEASURED}, [], "expected a share below 1", 2,
    ),
    "no such column": (
        {"privacy": {"unit": "patient", "max_instances": 2}}, [], "'patient'", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_spends_nothing(
    tmp_path: Path, records: Path, state: Path, name: str
) -> None:
    sections, flags, expected, code = MISTAKES[name]
    study, out = private(tmp_path, records, **sections), tmp_path / "run"
    done = veilgraft("simulate", study, "--state", state, "--out", out, *flags)
    one_sentence(done, expected, code)
    assert not (state / "ledger.db").exists()
    assert not out.exists()


def test_private_records_need_a_folder_that_outlives_the_run(tmp_path: Path, records: Path) -> None:
    done = veilgraft("simulate", private(tmp_path, records), "--out", tmp_path / "run")
    one_sentence(done, "--state: missing")
    assert not (tmp_path / "run").exists()


def test_a_ledger_that_was_rolled_back_is_noticed_by_its_anchor(
    tmp_path: Path, records: Path, state: Path
) -> None:
    study = private(tmp_path, records, simulation={"max_epsilon": 9.0})
    assert veilgraft("simulate", study, "--state", state, "--out", tmp_path / "1").returncode == 0
    shutil.copytree(state, tmp_path / "backup")
    other = private(tmp_path, records, simulation={"max_epsilon": 9.0}, training={"rounds": 3})
    assert veilgraft("simulate", other, "--state", state, "--out", tmp_path / "2").returncode == 0
    anchor = veilgraft("ledger", "anchor", state)
    assert anchor.returncode == 0
    kept = tmp_path / "anchor.txt"
    kept.write_text(anchor.stdout)
    assert veilgraft("ledger", "verify", state, "--anchor", kept).returncode == 0
    assert veilgraft("ledger", "verify", state, "--anchor", anchor.stdout.strip()).returncode == 0
    back = tmp_path / "backup"
    assert veilgraft("ledger", "verify", back).returncode == 0
    one_sentence(
        veilgraft("ledger", "verify", back, "--anchor", kept), "the ledger was rolled back", code=1
    )
    nonsense = veilgraft("ledger", "verify", back, "--anchor", "nonsense")
    one_sentence(nonsense, "--anchor: expected NUMBER:HASH")


def test_a_site_looks_at_its_own_records_and_is_warned_of_near_equal_ids(
    tmp_path: Path, records: Path
) -> None:
    table = pq.read_table(records)
    ids = table["person"].to_pylist()
    ids[0] = "p-000"
    ids[1] = "P000"
    columns = {"image": table["image"], "label": table["label"], "case": ids}
    pq.write_table(pa.table(columns), tmp_path / "own.parquet")
    site = {
        "site": "ward-7",
        "data": {"path": "own.parquet", "unit": "case"},
        "units": 200,
        "held_out": 0.25,
        "limits": {"max_epsilon": 5.0},
        "state": "state",
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    study = written(tmp_path, privacy=PERSON, evaluation=MEASURED)
    command = ("site", "examine", tmp_path / "site.yaml", "--study", study)
    done = veilgraft(*command, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    # Person 000 kept one row of three, and two strangers appeared.
    assert facts["units"] == 202
    assert facts["records"] == sum(facts["labels"].values()) == 600
    assert facts["near_equal_ids"] == 1
    assert facts["for_example"] == ["'P000' = 'p-000'"]
    assert facts["most_rows_of_a_unit"] == 3
    assert facts["rows_beyond_max_instances"] == 199
    assert 25 < facts["held_out_units"] < 80
    assert facts["epsilon"] == pytest.approx(3.0)
    assert facts["refused"] is None
    assert "near_equal_ids: 1" in veilgraft(*command).stdout
    site["held_out"] = 0.0
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    told = json.loads(veilgraft(*command, "--json").stdout)["refused"]
    assert "held_out is 0" in told
    site |= {"held_out": 0.25, "limits": {"max_epsilon": 2.9}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    told = json.loads(veilgraft(*command, "--json").stdout)["refused"]
    assert "would come to ε = 3 at δ = 2e-05; the cap is 2.9" in told
    assert not (tmp_path / "state" / "ledger.db").exists()
    assert not list((tmp_path / "state").glob(".trial-*"))
    # What was granted counts, and a trial changes nothing of it.
    site["limits"] = {"max_epsilon": 3.5}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    with closing(Ledger(tmp_path / "state" / "ledger.db")) as ledger:
        longer = written(tmp_path / "b", training={"rounds": 5}, privacy=PERSON)
        contract = Study.read(longer)
        terms = Terms(3.5, 2e-5, 0.25, Site.read(tmp_path / "site.yaml").unit(contract))
        ledger.grant("ward-7", contract.digest, plan(contract), terms, units=200)
        before = ledger.head()
        told = json.loads(veilgraft(*command, "--json").stdout)["refused"]
        assert "the cap is 3.5" in told
        assert ledger.head() == before


def test_a_folder_is_run_by_one_process_at_a_time(tmp_path: Path, records: Path) -> None:
    import fcntl
    import os

    out = tmp_path / "run"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        done = veilgraft("simulate", DEMO / "study.yaml", "--out", out)
    finally:
        os.close(folder)
    one_sentence(done, "another process is running it")
    assert list(out.iterdir()) == []

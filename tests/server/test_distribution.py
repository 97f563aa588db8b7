"""What a coordinator sends of a backbone."""

import doctest
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from veilgraft.errors import InputError, MessageError
from veilgraft.model import bundle
from veilgraft_server import distribution

DEMO = Path(__file__).parents[2] / "deploy/veilgraft_deploy/demo/backbone"
WEIGHTS = "model.safetensors"


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "backbone"))


def test_the_example_of_names_holds() -> None:
    result = doctest.testmod(bundle)
    assert (result.attempted, result.failed) == (1, 0)


def test_a_manifest_states_every_file_and_has_the_digest() -> None:
    files = json.loads(distribution.manifest(DEMO))["files"]
    for name, file in files.items():
        data = (DEMO / name).read_bytes()
        assert file == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert set(files) == {path.name for path in DEMO.iterdir()}
    stated = {name: file["sha256"] for name, file in files.items()}
    assert bundle.digest_of(stated) == bundle.digest(DEMO)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "sub/config.json"])
def test_a_folder_with_a_file_that_no_site_takes_is_told_at_once(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match="no file of this name"):
        distribution.manifest(folder)


def test_the_manifest_of_the_folder_is_not_sent(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    digest = bundle.write_manifest(folder)
    assert distribution.manifest(folder, digest) == distribution.manifest(DEMO)


@pytest.mark.parametrize("size", [1000, 648, 8 << 20])
def test_the_parts_make_up_the_files_small_ones_first(size: int) -> None:
    missing = dict.fromkeys([path.name for path in DEMO.iterdir()], 0)
    came: dict[str, bytes] = {}
    for name, offset, data in distribution.parts(DEMO, missing, size):
        assert offset == len(came.get(name, b""))
        assert 0 < len(data) <= size
        came[name] = came.get(name, b"") + data
    assert list(came)[-1] == WEIGHTS
    assert came == {path.name: path.read_bytes() for path in DEMO.iterdir()}


def test_only_what_is_missing_is_sent() -> None:
    parts = list(distribution.parts(DEMO, {WEIGHTS: 640_000}, 5000))
    assert [(name, offset) for name, offset, _ in parts] == [(WEIGHTS, 640_000), (WEIGHTS, 645_000)]
    assert b"".join(data for *_, data in parts) == (DEMO / WEIGHTS).read_bytes()[640_000:]
    assert list(distribution.parts(DEMO, {})) == []


def test_the_headers_of_all_weights_come_before_the_rest_of_any(tmp_path: Path) -> None:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(bytes(25))
    (tmp_path / "tokenizer.json").write_bytes(bytes(40))
    parts = distribution.parts(tmp_path, dict.fromkeys([*names, "tokenizer.json"], 0), 10)
    places = [(name, offset) for name, offset, _ in parts]
    assert {name for name, _ in places[:4]} == {"tokenizer.json"}
    assert places[4:6] == [(name, 0) for name in names]


def test_an_empty_file_is_one_empty_part(tmp_path: Path) -> None:
    (tmp_path / "NOTICE").touch()
    assert list(distribution.parts(tmp_path, {"NOTICE": 0})) == [("NOTICE", 0, b"")]


def test_a_folder_that_changed_is_not_sent(tmp_path: Path) -> None:
    folder, digest = copied(tmp_path), bundle.digest(DEMO)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"backbone\.digest: expected"):
        distribution.manifest(folder, digest)
    with pytest.raises(InputError, match=r"backbone\.digest: expected"):
        next(distribution.parts(folder, {"config.json": 0}, expected=digest))


def test_a_change_between_two_calls_is_seen(tmp_path: Path) -> None:
    folder, digest = copied(tmp_path), bundle.digest(DEMO)
    for _ in range(2):
        assert len(list(distribution.parts(folder, {"config.json": 0}, expected=digest))) == 1
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(weights))
    # Two writes within a tick of the file system's clock look like one.
    os.utime(folder / WEIGHTS, (0, 0))
    with pytest.raises(InputError, match=r"backbone\.digest: expected"):
        next(distribution.parts(folder, {"config.json": 0}, expected=digest))


def test_a_file_that_becomes_shorter_on_the_way_is_an_error(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    parts = distribution.parts(folder, {WEIGHTS: 0}, 100_000)
    next(parts)
    (folder / WEIGHTS).write_bytes(b"short")
    with pytest.raises(InputError, match="became shorter"):
        next(parts)


@pytest.mark.parametrize(
    ("name", "offset"),
    [("../config.json", 0), ("/etc/passwd", 0), ("LICENSE", 0), (WEIGHTS, -1), (WEIGHTS, 1 << 60)],
)
def test_a_site_gets_nothing_but_the_files_that_were_offered(name: str, offset: int) -> None:
    with pytest.raises(MessageError, match="missing"):
        next(distribution.parts(DEMO, {name: offset}))

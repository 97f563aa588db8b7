"""Backbones that arrive in parts, from coordinators honest and hostile."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.errors import InputError, VeilgraftError
from veilgraft.model import bundle
from veilgraft_client import arrival
from veilgraft_client.bundles import Bundles

DEMO = Path(__file__).parents[2] / "deploy/veilgraft_deploy/demo/backbone"
DIGEST = bundle.digest(DEMO)
WEIGHTS = "model.safetensors"
CAP = 1 << 30
STEP = 100_000


@pytest.fixture
def store(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path / "backbones", CAP)


def manifest(folder: Path) -> bytes:
    return json.dumps({"files": bundle.contents(folder)}).encode()


def stated(files: dict[str, int]) -> tuple[str, bytes]:
    """Return digest and manifest of files of these sizes that nobody has."""
    hashes = {name: hashlib.sha256(repr(name).encode()).hexdigest() for name in files}
    entries = {name: {"sha256": hashes[name], "bytes": files[name]} for name in files}
    return bundle.digest_of(hashes), json.dumps({"files": entries}).encode()


def missing(answer: bytes) -> dict[str, int]:
    found: dict[str, int] = json.loads(answer)["missing"]
    return found


def send(
    store: Bundles, folder: Path, step: int = STEP, until: Callable[[str, int], bool] | None = None
) -> dict[str, int]:
    """Send what the store asks for next, until it has all or `until` says to stop."""
    digest = bundle.digest(folder)
    wanted = missing(store.offer(digest, manifest(folder)))
    while wanted:
        name, offset = next(iter(wanted.items()))
        if until is not None and until(name, offset):
            break
        data = (folder / name).read_bytes()[offset : offset + step]
        wanted = missing(store.part(digest, name, offset, data))
    return wanted


def at_weights(name: str, _: int) -> bool:
    return name == WEIGHTS


def under_way(store: Bundles) -> Path:
    return store.folder / f"{DIGEST.removeprefix('sha256:')}.partial"


def assert_whole(store: Bundles, folder: Path = DEMO) -> None:
    made = store.path(bundle.digest(folder))
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert [p.name for p in store.folder.iterdir()] == [made.name]


def altered(tmp_path: Path, **config: object) -> Path:
    """Return the demo's backbone with another configuration, pinned as it is then."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "altered"))
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def with_header(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return the demo's backbone with another header, pinned as it is then."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "altered"))
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return folder


# What is whole


def test_a_backbone_sent_in_parts_is_whole_and_private(store: Bundles) -> None:
    assert not store.has(DIGEST)
    assert send(store, DEMO) == {}
    assert store.has(DIGEST)
    assert_whole(store)
    made = store.path(DIGEST)
    assert {p.stat().st_mode & 0o777 for p in (store.folder, made)} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in made.iterdir()} == {0o600}


def test_what_is_here_is_not_sent_again(store: Bundles) -> None:
    send(store, DEMO)
    assert missing(store.offer(DIGEST, manifest(DEMO))) == {}
    assert missing(store.part(DIGEST, "config.json", 0, b"anything")) == {}
    assert_whole(store)


def test_small_files_are_wanted_before_the_weights(store: Bundles) -> None:
    wanted = missing(store.offer(DIGEST, manifest(DEMO)))
    assert list(wanted)[-1] == WEIGHTS
    assert set(wanted.values()) == {0}


def test_importing_the_store_imports_no_torch() -> None:
    code = "import sys, veilgraft_client.bundles; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_folder_given_offline_goes_through_the_same_checks(
    store: Bundles, tmp_path: Path
) -> None:
    assert store.add(DEMO, DIGEST) == store.path(DIGEST)
    assert_whole(store)
    with pytest.raises(InputError, match=r"backbone\.digest: expected"):
        store.add(DEMO, "sha256:" + "0" * 64)
    bad = altered(tmp_path, auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(InputError, match="auto_map"):
        store.add(bad, bundle.digest(bad))
    (bad / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="no file of this name"):
        store.add(bad, bundle.digest(bad))


def test_a_folder_given_offline_finishes_one_that_began_in_parts(store: Bundles) -> None:
    send(store, DEMO, until=lambda name, offset: offset >= 3 * STEP)
    store.add(DEMO, DIGEST)
    assert_whole(store)


def test_weights_in_several_files_are_checked_before_more_than_headers_are_taken(
    store: Bundles, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(DEMO, tmp_path / "sharded"))
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = len(tensors) // 2
    save_file(dict(tensors[:half]), folder / names[0])
    save_file(dict(tensors[half:]), folder / names[1])
    digest = bundle.digest(folder)
    send(store, folder, until=lambda name, _: name == names[1])
    data = (folder / names[0]).read_bytes()
    with pytest.raises(InputError, match="headers of all weights before the rest"):
        store.part(digest, names[0], STEP, data[STEP : 2 * STEP])
    assert send(store, folder) == {}
    assert_whole(store, folder)


def test_an_empty_file_is_a_file(store: Bundles, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "noticed"))
    (folder / "NOTICE").touch()
    assert send(store, folder) == {}
    assert_whole(store, folder)


# What is offered


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/passwd", "a/b", "a\0b", "", ".", "..", ".config.json", "pytorch_model.bin",
        "modeling.py", "adapter_config.json", "manifest.json", "LICENSE/../x", "LICENSE..x",
        "LICENSE\n", "LICENSE\x1b[2J", "model-../x-of-1.safetensors", "Config.json",
    ],
)  # fmt: skip
def test_only_plain_names_on_the_list_are_taken(store: Bundles, name: str) -> None:
    digest, offered = stated({"config.json": 10, name: 10})
    with pytest.raises(InputError, match="no file of this name"):
        store.offer(digest, offered)
    store.offer(*stated({"config.json": 10}))
    with pytest.raises(InputError, match="expected the name of a file that was offered"):
        store.part(stated({"config.json": 10})[0], name, 0, b"x")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({f"LICENSE{n}": 1 for n in range(arrival.MAX_FILES + 1)}, "at most 64 items"),
        ({"model.safetensors": CAP + 1}, "model.safetensors: expected 8 to"),
        ({"model.safetensors": 7}, "model.safetensors: expected 8 to"),
        ({f"model-{n}-of-2.safetensors": CAP // 2 + 1 for n in (1, 2)}, "manifest: expected at"),
        ({"config.json": arrival.MAX_SMALL + 1}, "config.json: expected 0 to"),
        ({"feature_statistics.safetensors": CAP}, "expected 0 to"),
        ({"tokenizer.json": arrival.MAX_TOKENIZER + 1}, "tokenizer.json: expected 0 to"),
        ({"config.json": -1}, "greater than or equal to 0"),
        ({}, "at least 1 item"),
    ],
)
def test_too_many_and_too_large_files_are_refused(
    store: Bundles, files: dict[str, int], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        store.offer(*stated(files))
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "offered",
    [
        b"", b"[]", b"\xff", b"{}", b'{"files":{},"more":1}', b"[" * 50_000, b" " * 70_000,
        b'{"files":{"config.json":{"sha256":"0","bytes":1}}}',
        b'{"files":{"config.json":{"sha256":"' + b"0" * 64 + b'","bytes":"1"}}}',
        b'{"files":{"config.json":{"sha256":"' + b"0" * 64 + b'","bytes":1e400}}}',
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(store: Bundles, offered: bytes) -> None:
    with pytest.raises(InputError, match="manifest"):
        store.offer(DIGEST, offered)


def test_a_manifest_with_another_digest_is_refused(store: Bundles) -> None:
    with pytest.raises(InputError, match="expected the digest"):
        store.offer("sha256:" + "0" * 64, manifest(DEMO))


@pytest.mark.parametrize("digest", ["", "../x", "sha256:..", "sha256:" + "0" * 63, DIGEST + "/"])
def test_what_is_no_digest_is_no_path(store: Bundles, digest: str) -> None:
    for call in (store.has, store.path):
        with pytest.raises(InputError, match="64 hex digits"):
            call(digest)
    with pytest.raises(InputError, match="64 hex digits"):
        store.part(digest, "config.json", 0, b"")


def test_what_was_not_offered_is_not_taken(store: Bundles) -> None:
    with pytest.raises(InputError, match="was not offered"):
        store.part(DIGEST, "config.json", 0, b"{")


def test_two_may_be_under_way_and_purging_makes_room(store: Bundles) -> None:
    some = [stated({"config.json": n}) for n in (10, 11)]
    other = stated({"config.json": 10, "LICENSE": 1})
    third = stated({"config.json": 10, "NOTICE": 1})
    # A manifest with other sizes under the same digest takes the first one's place.
    for offered in (*some, other):
        store.offer(*offered)
    with pytest.raises(InputError, match="2 backbones are under way"):
        store.offer(*third)
    assert store.purge(keep=[other[0]]) == 1
    store.offer(*third)
    assert missing(store.offer(*other)) == {"LICENSE": 0, "config.json": 0}


def test_purging_keeps_what_it_is_told_to(store: Bundles) -> None:
    send(store, DEMO)
    store.offer(*stated({"config.json": 10}))
    assert store.purge(keep=[DIGEST]) == 1
    assert_whole(store)
    assert store.purge() == 1
    assert not store.has(DIGEST)
    assert store.purge() == 0
    send(store, DEMO)
    assert_whole(store)


# What is sent


def test_a_gap_an_overlap_and_an_end_beyond_the_end(store: Bundles) -> None:
    send(store, DEMO, until=lambda _, offset: offset > 0)
    data = (DEMO / WEIGHTS).read_bytes()
    partial = under_way(store) / "files" / WEIGHTS
    with pytest.raises(InputError, match=f"expected bytes from {STEP} on"):
        store.part(DIGEST, WEIGHTS, STEP + 1, b"x")
    with pytest.raises(InputError, match=f"{len(data)} in all"):
        store.part(DIGEST, WEIGHTS, STEP, data[STEP:] + b"x")
    with pytest.raises(InputError, match="in all"):
        store.part(DIGEST, WEIGHTS, -1, b"x")
    with pytest.raises(InputError, match="at a time"):
        store.part(DIGEST, WEIGHTS, 0, bytes(arrival.MAX_PART + 1))
    assert partial.read_bytes() == data[:STEP]
    # Again, or with other bytes: what is here stays as it is.
    assert missing(store.part(DIGEST, WEIGHTS, 0, bytes(STEP))) == {WEIGHTS: STEP}
    assert missing(store.part(DIGEST, WEIGHTS, 0, bytes(STEP) + data[STEP : STEP + 5])) == {
        WEIGHTS: STEP + 5
    }
    assert partial.read_bytes() == data[: STEP + 5]
    assert send(store, DEMO) == {}
    assert_whole(store)


def test_weights_are_not_taken_before_the_configuration(store: Bundles) -> None:
    store.offer(DIGEST, manifest(DEMO))
    with pytest.raises(InputError, match="before the weights"):
        store.part(DIGEST, WEIGHTS, 0, (DEMO / WEIGHTS).read_bytes()[:STEP])
    assert not (under_way(store) / "files" / WEIGHTS).exists()


def test_a_wrong_file_is_asked_for_again_so_many_times(store: Bundles) -> None:
    store.offer(DIGEST, manifest(DEMO))
    wrong = bytes((DEMO / "config.json").stat().st_size)
    for _ in range(arrival.MAX_STRIKES - 1):
        assert missing(store.part(DIGEST, "config.json", 0, wrong))["config.json"] == 0
        assert not (under_way(store) / "files/config.json").exists()
    with pytest.raises(InputError, match="came wrong 3 times"):
        store.part(DIGEST, "config.json", 0, wrong)
    # Neither a new process nor another manifest under the digest takes that back.
    again = Bundles(store.folder, CAP)
    with pytest.raises(InputError, match="purge"):
        again.offer(DIGEST, manifest(DEMO))
    assert again.purge() == 1
    assert send(again, DEMO) == {}


def test_wrong_weights_are_asked_for_again_and_then_whole(store: Bundles) -> None:
    data = bytearray((DEMO / WEIGHTS).read_bytes())
    data[-1] ^= 1
    send(store, DEMO, until=at_weights)
    assert missing(store.part(DIGEST, WEIGHTS, 0, bytes(data))) == {WEIGHTS: 0}
    assert send(store, DEMO) == {}
    assert_whole(store)


def test_sizes_that_lie_end_in_a_refusal_and_do_not_bar_the_true_ones(store: Bundles) -> None:
    lying = json.loads(manifest(DEMO))
    lying["files"]["config.json"]["bytes"] = 5
    assert missing(store.offer(DIGEST, json.dumps(lying).encode()))["config.json"] == 0
    answer = store.part(DIGEST, "config.json", 0, (DEMO / "config.json").read_bytes()[:5])
    assert missing(answer)["config.json"] == 0
    assert send(store, DEMO) == {}
    assert_whole(store)


def test_what_was_sound_under_another_manifest_is_hashed_anew(store: Bundles) -> None:
    send(store, DEMO, until=at_weights)
    other = json.loads(manifest(DEMO))
    other["files"][WEIGHTS]["bytes"] += 1
    assert len(missing(store.offer(DIGEST, json.dumps(other).encode()))) == len(other["files"])
    wrong = bytes(other["files"]["config.json"]["bytes"])
    assert "config.json" in missing(store.part(DIGEST, "config.json", 0, wrong))
    assert send(store, DEMO) == {}
    assert_whole(store)


# What the headers say


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, arrival.MAX_HEADER + 1])
def test_a_header_that_claims_too_much_is_refused_by_its_first_bytes(
    store: Bundles, length: int
) -> None:
    send(store, DEMO, until=at_weights)
    with pytest.raises(InputError, match="expected a header of at most"):
        store.part(DIGEST, WEIGHTS, 0, length.to_bytes(8, "little"))
    assert not (under_way(store) / "files" / WEIGHTS).exists()
    assert send(store, DEMO) == {}


def _larger(header: dict[str, Any]) -> None:
    header["encoder.stages.0.layers.0.layer.0.convolution.weight"]["data_offsets"][1] += 4


def _other_type(header: dict[str, Any]) -> None:
    next(t for n, t in header.items() if n.endswith("weight"))["dtype"] = "F64"


def _no_type(header: dict[str, Any]) -> None:
    next(t for n, t in header.items() if n.endswith("weight"))["dtype"] = "OBJECT"


def _renamed(header: dict[str, Any]) -> None:
    header["stranger"] = header.pop(next(n for n in header if n.endswith("weight")))


def _transposed(header: dict[str, Any]) -> None:
    next(t for n, t in header.items() if n.endswith("convolution.weight"))["shape"].reverse()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_larger, "safetensors"),
        (_other_type, "safetensors"),
        (_no_type, "safetensors"),
        (_renamed, "expected a tensor|no such tensor"),
        (_transposed, "expected shape"),
    ],
)
def test_a_header_that_fits_neither_file_nor_configuration_is_refused_with_its_first_part(
    store: Bundles, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    folder = with_header(tmp_path, change)
    assert_refused_with_the_header(store, folder, says)


def assert_refused_with_the_header(store: Bundles, folder: Path, says: str) -> None:
    digest = bundle.digest(folder)
    wanted = send(store, folder, until=at_weights)
    assert list(wanted) == [WEIGHTS]
    with pytest.raises(InputError, match=says):
        store.part(digest, WEIGHTS, 0, (folder / WEIGHTS).read_bytes()[:20_000])
    partial = store.folder / f"{digest.removeprefix('sha256:')}.partial"
    assert sorted(p.name for p in partial.iterdir()) == ["files", "offer.json", "strikes"]
    assert not (partial / "files" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_sizes": [32, 64, 128]}, "expected shape"),
        ({"depths": [1, 1, 10**9]}, "depths"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "evil"}}, "quantization_config"),
        ({"kernel_config": "hub/evil"}, "kernel_config"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": ["resnet"]}, "model_type"),
        ({"hidden_sizes": "evil"}, "config.json"),
    ],
)
def test_a_configuration_that_is_not_allowed_is_refused_with_the_first_part_of_the_weights(
    store: Bundles, tmp_path: Path, config: dict[str, object], says: str
) -> None:
    assert_refused_with_the_header(store, altered(tmp_path, **config), says)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\0", '{"a":' * 900 + "1" + "}" * 900])
def test_a_configuration_that_is_no_mapping_is_refused(
    store: Bundles, tmp_path: Path, text: str
) -> None:
    folder = altered(tmp_path)
    (folder / "config.json").write_text(text)
    assert_refused_with_the_header(store, folder, "config.json|outline")


def test_tensors_above_the_cap_are_refused_though_their_file_is_below(tmp_path: Path) -> None:
    # Half precision doubles in memory; 700,000 bytes are more than the file has.
    def halved(header: dict[str, Any]) -> None:
        end = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            half = tensor["dtype"] == "F32"
            length = (tensor["data_offsets"][1] - tensor["data_offsets"][0]) // (2 if half else 1)
            tensor |= {"dtype": "F16" if half else "I64", "data_offsets": [end, end + length]}
            end += length

    folder = with_header(tmp_path, halved)
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    (folder / WEIGHTS).write_bytes(data[: 8 + length + end])
    store = Bundles(tmp_path / "backbones", 500_000)
    assert_refused_with_the_header(store, folder, "at most 500000 bytes")


def test_statistics_that_are_no_tensors_are_refused(store: Bundles, tmp_path: Path) -> None:
    folder = altered(tmp_path)
    (folder / bundle.STATISTICS).write_bytes((1 << 60).to_bytes(8, "little") + bytes(100))
    assert_refused_with_the_header(store, folder, "feature_statistics.safetensors: can't be read")


def test_a_backbone_without_weights_is_refused(store: Bundles, tmp_path: Path) -> None:
    folder = altered(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="missing; weights are read from safetensors"):
        send(store, folder)
    with pytest.raises(InputError, match="came wrong"):
        store.offer(bundle.digest(folder), manifest(folder))


# What is planted, and what is damaged


def test_a_link_planted_under_a_file_is_not_followed(store: Bundles, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    store.offer(DIGEST, manifest(DEMO))
    for plant in (os.symlink, os.link):
        plant(outside, under_way(store) / "files/config.json")
        with pytest.raises(InputError, match="links are refused"):
            store.part(DIGEST, "config.json", 0, (DEMO / "config.json").read_bytes())
        (under_way(store) / "files/config.json").unlink()
    assert outside.read_bytes() == b""


def test_a_link_in_the_place_of_a_folder_is_not_followed(store: Bundles, tmp_path: Path) -> None:
    outside = Path(shutil.copytree(DEMO, tmp_path / "outside"))
    store.folder.mkdir(mode=0o700)
    place = store.folder / DIGEST.removeprefix("sha256:")
    place.symlink_to(outside)
    assert not store.has(DIGEST)
    with pytest.raises(InputError, match="is not in"):
        store.path(DIGEST)
    under_way(store).symlink_to(outside)
    with pytest.raises(InputError, match="links are refused"):
        store.offer(DIGEST, manifest(DEMO))
    under_way(store).unlink()
    assert send(store, DEMO) == {}
    assert_whole(store)
    assert len(list(outside.iterdir())) == len(list(DEMO.iterdir()))


def test_every_file_is_hashed_at_each_call(store: Bundles) -> None:
    send(store, DEMO)
    weights = store.path(DIGEST) / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"backbone\.digest: expected"):
        store.path(DIGEST)
    # What is rotten is told to nobody as being here.
    assert not store.has(DIGEST)
    send(store, DEMO)
    # A link, even to the right bytes, is no file of ours.
    weights.unlink()
    weights.symlink_to(DEMO / WEIGHTS)
    with pytest.raises(InputError, match="links are refused"):
        store.path(DIGEST)
    # What is damaged is wanted again.
    assert send(store, DEMO) == {}
    assert_whole(store)


# What breaks off


def test_a_torn_part_is_sent_again_and_its_rest_is_taken(store: Bundles) -> None:
    send(store, DEMO, until=lambda _, offset: offset >= 2 * STEP)
    data = (DEMO / WEIGHTS).read_bytes()
    with (under_way(store) / "files" / WEIGHTS).open("ab") as file:
        file.write(data[2 * STEP : 2 * STEP + 777])
    again = Bundles(store.folder, CAP)
    answer = again.part(DIGEST, WEIGHTS, 2 * STEP, data[2 * STEP : 3 * STEP])
    assert missing(answer) == {WEIGHTS: 3 * STEP}
    assert send(again, DEMO) == {}
    assert_whole(again)


def test_a_crash_before_the_last_check_or_after_the_rename_is_made_good(store: Bundles) -> None:
    send(store, DEMO, until=at_weights)
    shutil.copyfile(DEMO / WEIGHTS, under_way(store) / "files" / WEIGHTS)
    left = shutil.copytree(under_way(store), store.folder.parent / "left")
    again = Bundles(store.folder, CAP)
    tail = (DEMO / WEIGHTS).read_bytes()[-10:]
    offset = (DEMO / WEIGHTS).stat().st_size - 10
    assert missing(again.part(DIGEST, WEIGHTS, offset, tail)) == {}
    assert_whole(again)
    shutil.copytree(left, under_way(store))
    assert missing(Bundles(store.folder, CAP).part(DIGEST, WEIGHTS, offset, tail)) == {}
    assert_whole(again)


def test_two_that_send_at_once_end_with_one_whole_backbone(store: Bundles) -> None:
    # Each with a store of its own, as two processes have.
    senders = [Bundles(store.folder, CAP) for _ in range(2)]
    with ThreadPoolExecutor(len(senders)) as pool:
        sent = [pool.submit(send, sender, DEMO, 20_000) for sender in senders]
        assert [future.result(timeout=60) for future in sent] == [{}, {}]
    assert_whole(store)


SENDER = """
import json, sys
from pathlib import Path
from veilgraft.model import bundle
from veilgraft_client.bundles import Bundles

folder, source, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store, files = Bundles(folder, 1 << 30), bundle.contents(source)
digest = bundle.digest(source)
answer = store.offer(digest, json.dumps({"files": files}).encode())
while missing := json.loads(answer)["missing"]:
    name, offset = next(iter(missing.items()))
    data = (source / name).read_bytes()[offset : offset + step]
    answer = store.part(digest, name, offset, data)
    print(name, offset + len(data), flush=True)
"""


@pytest.mark.parametrize("parts", [2, 30])
def test_after_a_kill_in_the_middle_what_was_acknowledged_is_there(
    store: Bundles, parts: int
) -> None:
    command = [sys.executable, "-c", SENDER, str(store.folder), str(DEMO), "2000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as sender:
        assert sender.stdout is not None
        lines = [sender.stdout.readline().split() for _ in range(parts)]
        os.kill(sender.pid, signal.SIGKILL)
        assert sender.wait(timeout=30) == -signal.SIGKILL
    wanted = missing(store.offer(DIGEST, manifest(DEMO)))
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    for name, acknowledged in lines:
        assert wanted.get(name, sizes[name]) >= int(acknowledged)
    assert WEIGHTS in wanted
    assert send(store, DEMO) == {}
    assert_whole(store)


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        pytest.skip(f"NOT TESTED: a full disk; mounting a small one is refused: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


@pytest.mark.skipif(shutil.which("mount") is None, reason="NOT TESTED: a full disk; no mount")
def test_a_full_disk_is_named_and_what_came_before_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 1024):
        store = Bundles(disk / "backbones", CAP)
        wanted = send(store, DEMO, until=lambda _, offset: offset > 0)
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
        with pytest.raises(VeilgraftError, match="the disk is full") as caught:
            send(store, DEMO)
        assert not isinstance(caught.value, InputError)
        here = (under_way(store) / "files" / WEIGHTS).stat().st_size
        assert wanted[WEIGHTS] <= here
        assert here % STEP == 0
        filler.unlink()
        assert send(Bundles(disk / "backbones", CAP), DEMO) == {}
        assert_whole(store)


@pytest.mark.skipif(shutil.which("mount") is None, reason="NOT TESTED: a full disk; no mount")
def test_a_backbone_that_has_no_room_is_refused_before_it_comes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 256):
        store = Bundles(disk / "backbones", CAP)
        with pytest.raises(VeilgraftError, match="bytes are needed"):
            store.offer(DIGEST, manifest(DEMO))


# Any order


@settings(max_examples=30, deadline=None)
@given(data=st.data(), step=st.integers(60_000, 400_000))
def test_parts_in_any_order_often_or_cut_short_end_whole_or_ask_for_the_rest(
    data: st.DataObject, step: int
) -> None:
    contents = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    places = [(n, at) for n, c in contents.items() for at in range(0, len(c), step)]
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(places), st.integers(1, step))))
    with tempfile.TemporaryDirectory() as folder:
        store = Bundles(Path(folder) / "backbones", CAP)
        have = dict.fromkeys(contents, 0)
        store.offer(DIGEST, manifest(DEMO))
        if data.draw(st.booleans()):
            send(store, DEMO, until=at_weights)
            have |= {name: len(contents[name]) for name in have if name != WEIGHTS}
        for (name, offset), length in drawn:
            part = contents[name][offset : min(offset + length, offset + step)]
            with contextlib.suppress(InputError):
                store.part(DIGEST, name, offset, part)
                have[name] = max(have[name], offset + len(part))
            if data.draw(st.integers(0, 9)) == 0:
                store = Bundles(store.folder, CAP)
            rest = {n: at for n, at in have.items() if at < len(contents[n])}
            assert missing(store.offer(DIGEST, manifest(DEMO))) == rest
        assert send(store, DEMO, step) == {}
        assert_whole(store)


# Memory

MEASURED = """
import json, re, sys, time
from pathlib import Path
from veilgraft.model import architecture, bundle
from veilgraft_client.bundles import Bundles
from veilgraft_server import distribution

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

target, source, demo = (Path(path) for path in sys.argv[1:])
architecture.check(demo, "mean", 1 << 30)
architecture.check(source, "mean", 1 << 30)
digest = bundle.digest(source)
Path("/proc/self/clear_refs").write_text("5")
before, began = kib("VmRSS"), time.monotonic()
store = Bundles(target, 1 << 30)
wanted = json.loads(store.offer(digest, distribution.manifest(source, digest)))["missing"]
for name, offset, data in distribution.parts(source, wanted, expected=digest):
    answer = store.part(digest, name, offset, data)
assert json.loads(answer)["missing"] == {}
taken = time.monotonic() - began
store.path(digest)
print(json.dumps({"peak": (kib("VmHWM") - before) * 1024, "seconds": taken}))
"""


def text_backbone(folder: Path, words: int) -> int:
    """Write a BERT of random weights, 4 KiB a word, and return its weights' bytes."""
    import torch
    from transformers import BertConfig, BertModel

    config = {
        "model_type": "bert", "vocab_size": words, "hidden_size": 1024, "num_hidden_layers": 1,
        "num_attention_heads": 8, "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        tensors = BertModel(BertConfig(**config)).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 4
        offsets = [end, end := end + size]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    block = os.urandom(1 << 20)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return (folder / WEIGHTS).stat().st_size


def measure(tmp_path: Path, words: int) -> None:
    size = text_backbone(tmp_path / "source", words)
    folders = [str(tmp_path / "store"), str(tmp_path / "source"), str(DEMO)]
    command = [sys.executable, "-c", MEASURED, *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    found = json.loads(done.stdout)
    print(
        f"{size / 1e6:.0f} MB: at most {found['peak'] / 1e6:.1f} MB of memory at both sides "
        f"together, {size / 1e6 / found['seconds']:.0f} MB/s"
    )
    assert found["peak"] < 4 * arrival.MAX_PART


def test_both_sides_together_hold_no_more_than_four_parts(tmp_path: Path) -> None:
    measure(tmp_path, 20_000)


@pytest.mark.drill
def test_500_megabytes_pass_with_no_more_than_four_parts_in_memory(tmp_path: Path) -> None:
    measure(tmp_path, 122_000)

"""The studies that a site knows: proposed by anybody, approved by a person."""

import json
import threading
from pathlib import Path

import pytest
from tests.client.gated import study

from veilgraft.config import canonical
from veilgraft.errors import InputError, RefusedError
from veilgraft_client import studies as stored
from veilgraft_client.studies import MAX_BYTES, MAX_PROPOSALS, Studies

CONTRACT = study()


def payload(name: str = "s") -> bytes:
    return canonical(study(name=name).canonical).encode()


def test_a_proposed_study_waits_and_an_approved_one_is_kept(tmp_path: Path) -> None:
    own = Studies(tmp_path / "state")
    assert own.propose(payload()) == CONTRACT
    assert (own.proposed(), own.approved()) == ({CONTRACT.digest: CONTRACT}, {})
    own.approve(CONTRACT.digest)
    again = Studies(tmp_path / "state")
    assert (again.proposed(), again.approved()) == ({}, {CONTRACT.digest: CONTRACT})
    assert again.approve(CONTRACT.digest) == CONTRACT
    assert own.propose(payload()) == CONTRACT
    assert own.proposed() == {}


def test_a_withdrawn_study_waits_again(tmp_path: Path) -> None:
    own = Studies(tmp_path)
    own.propose(payload())
    own.approve(CONTRACT.digest)
    own.withdraw(CONTRACT.digest)
    assert (list(own.proposed()), own.approved()) == ([CONTRACT.digest], {})
    with pytest.raises(InputError, match="no approved study"):
        own.withdraw(CONTRACT.digest)


@pytest.mark.parametrize(
    "digest", ["", "sha256:" + "0" * 64, "../../etc/passwd", "sha256:../studies/x", "*"]
)
def test_what_nobody_proposed_can_t_be_approved(tmp_path: Path, digest: str) -> None:
    own = Studies(tmp_path)
    own.propose(payload())
    for refuse in (own.approve, own.find, own.withdraw, own.reject):
        with pytest.raises(InputError, match=r"no .*study has this digest"):
            refuse(digest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"nul",
        b"[" * 200_000,
        b'{"format":2}',
        b" " * (MAX_BYTES + 1),
        payload().replace(b'"rounds":3', b'"rounds":3,"x":1'),
        payload().replace(b'"rounds":3', b'"rounds":"3"'),
        payload().replace(b'"momentum":0.0,', b""),
        payload().replace(b'"delta":1e-05', b'"delta":NaN'),
    ],
)
def test_what_is_no_study_in_canonical_form_is_not_kept(tmp_path: Path, data: bytes) -> None:
    own = Studies(tmp_path)
    with pytest.raises(InputError):
        own.propose(data)
    assert own.proposed() == {}


def test_it_is_kept_as_it_was_understood(tmp_path: Path) -> None:
    own, hidden = Studies(tmp_path), payload().replace(b'"name":"s"', b'"name":"x","name":"s"')
    assert own.propose(hidden + b"\n" * 1000) == CONTRACT
    assert own.file(CONTRACT.digest).read_bytes() == payload()


def test_a_study_whose_canonical_form_is_too_long_does_not_lie_in_the_way(tmp_path: Path) -> None:
    weights = {f"{index:05}": 1e5 for index in range(16_000)}
    long = study(aggregation={"weights": weights}).canonical
    data = json.dumps(long, separators=(",", ":")).replace(":100000.0", ":1e5").encode()
    own = Studies(tmp_path)
    assert len(data) < MAX_BYTES < len(canonical(long).encode())
    with pytest.raises(InputError, match="at most"):
        own.propose(data)
    assert own.proposed() == {}


def test_so_many_wait_and_the_next_is_told_what_to_do(tmp_path: Path) -> None:
    own = Studies(tmp_path)
    for index in range(MAX_PROPOSALS):
        own.propose(payload(f"s{index}"))
    own.propose(payload("s0"))
    with pytest.raises(RefusedError, match="veilgraft site reject") as refused:
        own.propose(payload("more"))
    assert refused.value.code == "unavailable"
    own.approve(study(name="s0").digest)
    own.propose(payload("more"))
    own.reject(study(name="s1").digest)
    own.propose(payload("one-more"))
    assert study(name="s1").digest not in own.proposed()


def test_threads_propose_no_more_than_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_PROPOSALS", 3)
    own = Studies(tmp_path)

    def propose(index: int) -> None:
        try:
            own.propose(payload(f"s{index}"))
        except RefusedError:
            return

    threads = [threading.Thread(target=propose, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(own.proposed()) == 3


def test_a_changed_file_is_told_and_nothing_is_served(tmp_path: Path) -> None:
    own = Studies(tmp_path)
    own.propose(payload())
    own.approve(CONTRACT.digest)
    own.file(CONTRACT.digest).write_bytes(payload("other"))
    with pytest.raises(InputError, match="it was changed"):
        own.approved()


def test_folders_are_the_owner_s_alone(tmp_path: Path) -> None:
    Studies(tmp_path / "state")
    for name in ("", "studies", "proposals"):
        assert (tmp_path / "state" / name).stat().st_mode & 0o777 == 0o700


def test_a_study_is_read_in_either_form(tmp_path: Path) -> None:
    own = Studies(tmp_path)
    own.propose(payload())
    assert Studies.read(own.file(CONTRACT.digest)) == CONTRACT
    (tmp_path / "study.yaml").write_text("name: s\n")
    with pytest.raises(InputError, match="purpose: missing"):
        Studies.read(tmp_path / "study.yaml")

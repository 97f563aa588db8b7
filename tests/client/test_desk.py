"""What a site's own people can have done, and what that changes."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.gated import BACKBONE, DIGEST, Party, party, request, study

from veilgraft.config import canonical
from veilgraft.errors import InputError, RefusedError
from veilgraft.messages import Release
from veilgraft.study import Study
from veilgraft_client import desk as desks

CONTRACT = study()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Party]:
    with party(tmp_path) as opened:
        yield opened


def proposed(own: Party, contract: Study = CONTRACT) -> str:
    answer = own.desk.do("propose", canonical(contract.canonical))
    digest: str = answer["study"]
    return digest


def test_status_shows_what_waits_is_approved_and_was_spent(own: Party) -> None:
    assert proposed(own) == CONTRACT.digest
    before = own.desk.do("status", "")
    assert [each["study"] for each in before["proposed"]] == [CONTRACT.digest]
    assert (before["approved"], before["epsilon_for_life"]) == ([], 0.0)
    own.desk.do("approve", CONTRACT.digest)
    own.ask(request(CONTRACT, own.coordinator))
    after = own.desk.do("status", "")
    assert after["proposed"] == []
    (shown,) = after["approved"]
    assert (shown["study"], shown["paid"], shown["rounds"]) == (CONTRACT.digest, 1, 3)
    assert 0 < shown["epsilon"] <= after["epsilon_for_life"] <= after["max_epsilon"]
    assert after["anchor"] == own.vault.ledger.head()


def test_approval_grants_serves_and_is_noted(own: Party) -> None:
    own.desk.do("approve", proposed(own))
    assert list(own.vault.approved) == [CONTRACT.digest]
    assert own.vault.ledger.sites() == ["a"]
    assert own.told()[-1][0] == "approved"
    assert isinstance(own.ask(request(CONTRACT, own.coordinator)), Release)
    assert own.prepared == []


def test_features_are_made_ready_where_the_backbone_is_here(own: Party) -> None:
    own.bundles.add(BACKBONE, DIGEST)
    own.desk.do("approve", proposed(own))
    assert own.prepared == [CONTRACT]


def test_what_the_site_s_file_refuses_is_never_approved(own: Party) -> None:
    dear = study(privacy={"noise_multiplier": 0.1})
    with pytest.raises(RefusedError, match="over budget"):
        own.desk.do("approve", proposed(own, dear))
    assert (own.studies.approved(), dict(own.vault.approved)) == ({}, {})
    assert own.told() == []
    assert own.vault.ledger.sites() == []


def test_withdrawing_serves_no_longer_and_approving_again_costs_nothing(own: Party) -> None:
    own.desk.do("approve", proposed(own))
    own.ask(request(CONTRACT, own.coordinator))
    life = own.desk.do("status", "")["epsilon_for_life"]
    assert own.desk.do("withdraw", CONTRACT.digest) == {"withdrawn": CONTRACT.digest}
    assert dict(own.vault.approved) == {}
    own.desk.do("approve", CONTRACT.digest)
    assert own.desk.do("status", "")["epsilon_for_life"] == life
    assert [kind for kind, _ in own.told()] == ["approved", "answered", "withdrawn", "approved"]


def test_what_was_proposed_may_be_rejected_and_what_was_approved_may_not(own: Party) -> None:
    assert own.desk.do("reject", proposed(own)) == {"rejected": CONTRACT.digest}
    assert own.studies.proposed() == {}
    assert own.told() == [("rejected", {"study": CONTRACT.digest})]
    own.desk.do("approve", proposed(own))
    with pytest.raises(InputError, match="no proposed study"):
        own.desk.do("reject", CONTRACT.digest)
    assert list(own.vault.approved) == [CONTRACT.digest]


def test_purging_removes_features_and_backbones_and_keeps_books_and_keys(own: Party) -> None:
    own.desk.do("approve", proposed(own))
    own.bundles.add(BACKBONE, DIGEST)
    folder = own.vault.site.state / "features"
    folder.mkdir(exist_ok=True)
    for name in ("0.npy", ".0.npy.x.partial"):
        (folder / name).write_bytes(b"0")
    (own.vault.site.state / "identity.pem").write_bytes(b"key")
    assert own.desk.do("purge", "") == {"features": 1, "backbones": 1}
    assert list(folder.iterdir()) == []
    assert not own.bundles.has(DIGEST)
    assert (own.vault.site.state / "identity.pem").exists()
    assert own.desk.do("verify", "")["ledger"] > 1
    assert own.told()[-1] == ("purged", {"features": 1, "backbones": 1})
    assert isinstance(own.ask(request(CONTRACT, own.coordinator)), Release)


def test_verify_counts_the_entries_of_both_books(own: Party) -> None:
    assert own.desk.do("verify", "") == {"ledger": 1, "log": 1}
    own.desk.do("approve", proposed(own))
    found = own.desk.do("verify", "")
    assert found["log"] == 2
    assert found["ledger"] > 1


def test_metrics_are_text_for_prometheus(own: Party) -> None:
    assert "veilgraft_epsilon_cap 50.0" in own.desk.do("metrics", "")["text"]


@pytest.mark.parametrize(
    ("verb", "argument"),
    [
        ("", ""),
        ("delete", ""),
        ("approve", ""),
        ("approve", "sha256:" + "0" * 64),
        ("withdraw", "../x"),
        ("propose", "{}"),
        ("propose", "[" * 100_000),
    ],
)
def test_what_can_t_be_done_is_said_and_changes_nothing(
    own: Party, verb: str, argument: str
) -> None:
    with pytest.raises(InputError):
        own.desk.do(verb, argument)
    assert own.told() == []


def test_a_study_that_takes_hours_to_price_does_not_hold_up_the_desk(
    own: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    pricing, over = threading.Event(), threading.Event()

    def slow(contract: Study) -> Any:
        pricing.set()
        over.wait(30)
        raise InputError("no price")

    # What a stranger proposed is not priced by who looks.
    proposed(own)
    monkeypatch.setattr(desks, "plan", slow)
    assert own.desk.do("status", "")["proposed"][0]["asked_noise_multiplier"] == 5.0
    assert not pricing.is_set()
    monkeypatch.setattr(own.vault, "approve", slow)

    def approve() -> None:
        with pytest.raises(InputError, match="no price"):
            own.desk.do("approve", CONTRACT.digest)

    thread = threading.Thread(target=approve)
    thread.start()
    try:
        assert pricing.wait(30)
        # It is seen to run, so nobody opens its books beside it.
        assert own.desk.do("ping", "") == {"site": "a"}
        assert own.desk.do("status", "")["approved"] == []
    finally:
        over.set()
        thread.join(30)

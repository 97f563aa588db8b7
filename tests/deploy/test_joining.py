"""`site join`: from an invitation to a folder with keys, also when it breaks off on the way."""

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.deploy.joined import Edge, answers, edge, records, study
from tests.system import hosts

from veilgraft.config import canonical
from veilgraft.errors import InputError, RefusedError, VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import SigningKey
from veilgraft.invitation import Invitation
from veilgraft.plan import plan
from veilgraft_client.policy import Site
from veilgraft_deploy import joining
from veilgraft_deploy.enrolling import enrol
from veilgraft_deploy.joining import accept_rotation, draft, join, prepare
from veilgraft_deploy.office import Office, order
from veilgraft_deploy.place import Place

SECRETS = ("state/identity.pem", "courier/node.pem")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge(tmp_path_factory.mktemp("edge")) as made:
        yield made


def joined(there: Edge, data: Path, folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    invitation = there.invitation()
    console = Console(file=said, width=200)
    digest = invitation.contract.digest
    facts = join(invitation, answers(data, **changes), folder, None, console, digest)
    return facts, said.getvalue()


def keys(place: Place) -> list[bytes]:
    return [(place.path / name).read_bytes() for name in SECRETS]


def test_a_bad_path_or_column_is_a_sentence_and_the_same_keys_join_in_the_end(
    there: Edge, tmp_path: Path
) -> None:
    folder, data = tmp_path / "a", records(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"nowhere\.parquet"):
        joined(there, tmp_path / "nowhere.parquet", folder)
    place = Place.open(folder)
    kept = keys(place)
    with pytest.raises(InputError, match="digit") as told:
        joined(there, data, folder, label="digit")
    assert all(len(line) < 400 for line in told.value.problems)
    before = len(there.asked)
    facts, said = joined(there, data, folder)
    assert facts["study"] == study().digest
    assert "60 records" in said
    assert there.key.public.fingerprint in said
    assert keys(place) == kept
    path, body = there.asked[-1]
    assert (path, body["site"], len(there.asked) - before) == ("/veilgraft/enrol", "a", 2)
    assert body["identity"] == SigningKey.load(place.identity).public.text
    with Office(Place.open(folder)) as office:
        assert list(office.vault.approved) == [facts["study"]]
        kinds = [note.kind for note in office.events.entries()]
    assert kinds[1:] == ["approved", "joined"]
    # Once something was approved, other answers no longer count, and the person is told.
    _, said = joined(there, data, folder, units=30)
    assert "is kept as it is" in said
    assert Place.open(folder).site.units == 60


def test_preparing_twice_changes_nothing_and_all_is_closed(there: Edge, tmp_path: Path) -> None:
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    place = prepare(there.invitation(), answers(data), folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = prepare(there.invitation(), answers(data), folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert again.coordinator == there.coordinator
    for name in ("site.yaml", "coordinator.json", *SECRETS):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    for closed in (place.state, place.courier, place.run, place.logs, place.work):
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700, closed
    with pytest.raises(InputError, match="is of site a"):
        prepare(there.invitation("b"), answers(data), folder)


STEPS = ["install_bundle", "_write", "_make_identity", "_settle_node_key", "_pin"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True])
def test_a_join_that_was_killed_at_any_step_goes_on(
    there: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    class Killed(BaseException):
        pass

    real = getattr(joining, step)

    def killed(*args: Any) -> None:
        if after:
            real(*args)
        raise Killed

    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(joining, step, killed)
        prepare(there.invitation(), answers(data), folder)
    # What a write that was cut off leaves.
    (folder / ".site.yaml.123").write_bytes(b"si")
    for name in SECRETS:
        path = folder / name
        path.with_name(f".{path.name}.new").write_bytes(b"")
    place = prepare(there.invitation(), answers(data), folder)
    enrol(place, there.invitation())
    assert there.asked[-1][1]["identity"] == SigningKey.load(place.identity).public.text


def test_a_folder_with_something_else_in_it_is_left_alone(there: Edge, tmp_path: Path) -> None:
    data = records(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="expected no folder, an empty one"):
        prepare(there.invitation(), answers(data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_new_invitation_keeps_the_site_s_key_and_makes_a_new_one_for_its_node(
    there: Edge, tmp_path: Path
) -> None:
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    one = keys(prepare(there.invitation(), answers(data), folder))
    other = keys(prepare(there.invitation(token="u" * 43), answers(data), folder))
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_another_coordinator_s_key_is_refused_and_the_old_one_stays(
    there: Edge, tmp_path: Path
) -> None:
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    prepare(there.invitation(), answers(data), folder)
    there.key, old = SigningKey.generate(), there.key
    try:
        with pytest.raises(InputError, match="is pinned; this invitation's is"):
            prepare(there.invitation(), answers(data), folder)
    finally:
        there.key = old
    assert Place.open(folder).coordinator.identity == old.public


def drafted(invitation: Invitation, **changes: Any) -> Site:
    text = draft(invitation, answers(Path("/r.parquet"), **changes))
    return Site.parse(yaml.safe_load(text), name="site.yaml", base=Path("/site"))


def test_site_yaml_is_commented_and_says_what_was_answered(there: Edge) -> None:
    text = draft(there.invitation(), answers(Path("/r.parquet")))
    lines = text.splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) >= 15
    assert all(len(line) <= 100 for line in lines)
    own = drafted(
        there.invitation(),
        label="a: b",
        input="x # y",
        max_epsilon=1e-5,
        held_out=0.25,
        courier_user="64200",
        public=True,
        seed=3,
        isolation="full",
    )
    assert (own.data.label, own.data.input, own.seed) == ("a: b", "x # y", 3)
    assert (own.limits.max_epsilon, own.held_out, own.courier_user) == (1e-5, 0.25, "64200")
    assert own.state == Path("/site/state")
    assert not drafted(there.invitation()).data_is_public


@pytest.mark.parametrize("name", ["1", "1e5", "null", "true", "no", "0x10", "2026-01-01"])
def test_a_site_may_be_named_as_what_yaml_takes_for_something_else(there: Edge, name: str) -> None:
    assert drafted(there.invitation(name)).site == name


@pytest.mark.parametrize("path", ["/a b/é.csv", "/{site}/x.csv", "/a'b\".csv", "/tab\t.csv", "/😀"])
def test_a_path_stays_what_it_is(there: Edge, path: str) -> None:
    text = draft(there.invitation(), answers(Path(path)))
    assert Site.parse(yaml.safe_load(text), name="s").data.path == Path(path)


@pytest.mark.parametrize("delta", [1e-12, 1.2345678e-5, 9.99e-4])
def test_the_limits_that_are_drafted_allow_the_study(there: Edge, delta: float) -> None:
    invitation = there.invitation(privacy={"noise_multiplier": 5.0, "delta": delta})
    limits = drafted(invitation).limits
    assert limits.delta / 2 >= delta
    price = plan(invitation.contract).epsilon()
    assert price is not None
    assert price <= limits.max_epsilon <= price + 0.002


def test_a_study_without_a_finite_price_asks_for_a_cap(there: Edge) -> None:
    many = {
        "algorithm": "dp-sgd",
        "rounds": 10_000,
        "learning_rate": 1.0,
        "sample_rate": 1e-4,
        "local_epochs": 1,
    }
    invitation = there.invitation(privacy={"noise_multiplier": 1e-3}, training=many)
    with pytest.raises(InputError, match="--max-epsilon: missing"):
        drafted(invitation)
    assert drafted(invitation, max_epsilon=9.0).limits.max_epsilon == 9.0


def test_a_site_yaml_that_a_person_changed_is_kept(there: Edge, tmp_path: Path) -> None:
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    place = prepare(there.invitation(), answers(data), folder)
    assert prepare(there.invitation(), answers(data, units=50), folder).site.units == 50
    text = place.config.read_text().replace("min_units: 1", "min_units: 7")
    place.config.write_text(text)
    prepare(there.invitation(), answers(data, units=40), folder)
    assert place.config.read_text() == text


# Whom it asks


def test_enrolling_says_what_is_wrong(there: Edge, tmp_path: Path) -> None:
    invitation = there.invitation()
    place = prepare(invitation, answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    enrol(place, invitation)
    body = there.asked[-1][1]
    assert set(body) == {"site", "token", "identity", "node", "time"}
    assert "PRIVATE" not in json.dumps(body)
    try:
        for status, kind, said in (
            (403, InputError, "refuses it"),
            (429, VeilgraftError, "try again"),
            (500, VeilgraftError, "HTTP 500"),
            (302, VeilgraftError, "HTTP 302"),
        ):
            there.status, there.location = status, "http://127.0.0.1:1/elsewhere"
            count = len(there.asked)
            with pytest.raises(kind, match=said):
                enrol(place, invitation)
            assert len(there.asked) == count + 1
    finally:
        there.status, there.location = 200, None
    away = invitation.coordinator.model_copy(update={"port": 1})
    with pytest.raises(VeilgraftError, match="can't be reached"):
        enrol(place, invitation.model_copy(update={"coordinator": away}))
    place.node_key.write_bytes(b"")
    with pytest.raises(InputError, match="remove it, and join again"):
        enrol(place, invitation)


def test_a_coordinator_s_words_can_t_pass_for_ours(there: Edge, tmp_path: Path) -> None:
    purpose = "[/]\n[bold]What it would cost[/]: ε = 0\x1b[2J"
    invitation = there.invitation(purpose=purpose)
    place = prepare(invitation, answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    said = io.StringIO()
    facts = {"studies": [{"records": 1, "labels": {"[red]\n": 1}}]}
    joining._explain(Console(file=said, width=300), place, invitation.contract, facts)
    text = said.getvalue()
    assert "\x1b[2J" not in text
    assert sum(line.startswith("What it would cost") for line in text.splitlines()) == 1


# A coordinator's new key


def rotation(path: Path, old: SigningKey, new: SigningKey, signer: SigningKey) -> Path:
    text = canonical({"new": new.public.text, "old": old.public.text}).encode()
    values = {
        "old": old.public.text,
        "new": new.public.text,
        "signature": signer.sign("rotation", text).hex(),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_new_key_is_accepted_only_if_the_old_one_signed_it(there: Edge, tmp_path: Path) -> None:
    place = prepare(there.invitation(), answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    new, path = SigningKey.generate(), tmp_path / "rotation.yaml"
    for old, signer, said in (
        (there.key, new, "signature"),
        (new, new, "old: expected the pinned key"),
    ):
        with pytest.raises(InputError, match=said):
            accept_rotation(place, rotation(path, old, new, signer), ask=False)
    assert place.coordinator.identity == there.key.public
    accept_rotation(place, rotation(path, there.key, new, there.key), ask=False)
    assert place.coordinator.identity == new.public
    log = EventLog(place.events)
    assert [note.kind for note in log.entries()][1:] == ["rotated"]
    log.close()
    # The same statement, or one by the key that was rotated away, is worth nothing now.
    with pytest.raises(InputError, match="old: expected the pinned key"):
        accept_rotation(place, path, ask=False)


def test_a_rotation_that_can_t_be_logged_is_not_trusted(there: Edge, tmp_path: Path) -> None:
    place = prepare(there.invitation(), answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    place.events.write_bytes(b"no log")
    new = SigningKey.generate()
    path = rotation(tmp_path / "rotation.yaml", there.key, new, there.key)
    with pytest.raises(VeilgraftError):
        accept_rotation(place, path, ask=False)
    assert place.coordinator.identity == there.key.public


# Orders


def test_orders_are_carried_out_where_no_vault_runs(there: Edge, tmp_path: Path) -> None:
    place = prepare(there.invitation(), answers(records(tmp_path / "a.parquet")), tmp_path / "a")
    assert order(place, "status")["approved"] == []
    digest = order(place, "propose", canonical(study().canonical))["study"]
    order(place, "approve", digest)
    assert [each["study"] for each in order(place, "status")["approved"]] == [digest]
    order(place, "withdraw", digest)
    with pytest.raises(RefusedError):
        dear = canonical(study(privacy={"noise_multiplier": 0.01}).canonical)
        order(place, "approve", order(place, "propose", dear)["study"])


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can be led astray")
def test_links_that_the_records_owner_has_laid_lead_root_nowhere(
    there: Edge, tmp_path: Path
) -> None:
    theirs, secret = tmp_path / "etc", tmp_path / "etc" / "shadow"
    theirs.mkdir()
    secret.write_bytes(b"root's")
    secret.chmod(0o600)
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    tmp_path.chmod(0o755)
    os.chown(data, 65020, 65020)
    folder.mkdir(mode=0o755)
    os.chown(folder, 65020, 65020)
    for name in ("state", "courier", "run", "logs"):
        (folder / name).symlink_to(theirs)
        with pytest.raises((InputError, OSError)):
            prepare(there.invitation(), answers(data), folder)
        (folder / name).unlink()
        found = secret.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
        assert (theirs.stat().st_uid, stat.S_IMODE(theirs.stat().st_mode)) == (0, 0o755)
        for made in folder.iterdir():
            hosts.delete(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can give a folder away")
def test_a_folder_of_a_stranger_is_refused(there: Edge, tmp_path: Path) -> None:
    data, folder = records(tmp_path / "a.parquet"), tmp_path / "a"
    os.chown(data, 65020, 65020)
    folder.mkdir()
    os.chown(folder, 65021, 65021)
    with pytest.raises(InputError, match="belongs to user 65021, and the records to user 65020"):
        prepare(there.invitation(), answers(data), folder)

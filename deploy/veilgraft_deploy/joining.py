"""`veilgraft site join`: from an invitation and a data path to a site that may start.

Nothing is told to the coordinator but that this site, with these keys, is the one it invited. A
join that was broken off goes on when it is called again: the keys are kept, for the token is bound
to them.
"""

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console
from rich.markup import escape

from veilgraft.config import canonical
from veilgraft.durable import give, sync_folder, write_atomically, write_new
from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.events import EventLog
from veilgraft.identity import SigningKey, passphrase
from veilgraft.invitation import Coordinator, Invitation, Rotation
from veilgraft.logs import plain
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.policy import Site
from veilgraft_client.separation import Owner
from veilgraft_client.studies import Studies
from veilgraft_deploy import doctor
from veilgraft_deploy.enrolling import enrol
from veilgraft_deploy.office import order
from veilgraft_deploy.place import Place, acting_as, pin, user
from veilgraft_deploy.provision import install_bundle


@dataclass(frozen=True)
class Answers:
    """What a person says of the site; the rest of `site.yaml` has safe values.

    Attributes:
        data: the records; with the columns that matter.
        units: the number of units to declare, a round one.
        max_epsilon: for the life of the data; by default what the study asks for.
    """

    data: Path
    units: int
    label: str | None = None
    input: str | None = None
    unit: str | None = None
    max_epsilon: float | None = None
    held_out: float | None = None
    public: bool = False
    seed: int | None = None
    isolation: str = "full"
    courier_user: str | int | None = None


def join(
    invitation: Invitation,
    answers: Answers,
    folder: Path,
    backbone: Path | None,
    console: Console,
    approved: str | None,
) -> dict[str, Any]:
    """Take a site from an invitation to where it may start; return what was agreed.

    Args:
        backbone: the backbone's folder, where it came by hand.
        approved: the study's digest, where a person has approved it already; else one is asked.

    Raises:
        InputError: something is wrong here, said in plain words.
        RefusedError: the person, or the site's own file, says no.
        VeilgraftError: the coordinator can't be reached.
    """
    place = prepare(invitation, answers, folder)
    study = invitation.contract
    if place.config.read_text(encoding="utf-8") != draft(invitation, answers):
        console.print(f"{place.config} is kept as it is; what it says counts", highlight=False)
    with place.as_owner():
        studies = Studies(place.site.state)
        studies.propose(canonical(invitation.study).encode())
        if backbone is not None:
            limit = place.site.limits.max_backbone_bytes
            Bundles(place.site.state / "backbones", limit).add(backbone, study.backbone.digest)
    # Of this study alone: what else was once proposed is no reason not to join.
    facts, problems = doctor.check(place, studies.file(study.digest))
    if problems:
        raise InputError(*problems)
    _explain(console, place, study, facts)
    if approved is None and not typer.confirm("Approve this study?", err=True):
        raise RefusedError(Refusal.STUDY_NOT_APPROVED, f"{study.digest}: not approved")
    order(place, "approve", study.digest)
    enrol(place, invitation)
    with place.as_owner(), contextlib.closing(EventLog(place.events)) as events:
        events.note("joined", coordinator=invitation.coordinator.identity.id, site=invitation.site)
    return {
        "site": invitation.site,
        "study": study.digest,
        "coordinator": invitation.coordinator.identity.fingerprint,
        "next": f"veilgraft site start --dir {folder}",
    }


def _explain(console: Console, place: Place, study: Study, facts: dict[str, Any]) -> None:
    """Show what would leave, what it would cost, and whom the site is about to trust."""
    planned = plan(study)
    for examined in facts["studies"]:
        counts = _said(", ".join(f"{name} {n}" for name, n in examined["labels"].items()))
        console.print(f"[bold]Here[/], for your eyes only: {examined['records']} records; {counts}")
    leaves = ", ".join(f"{count} × {kind}" for kind, (count, _) in planned.releases.items())
    console.print(f"[bold]Study[/] {study.name}: {_said(study.purpose)}", highlight=False)
    console.print(f"[bold]What would leave[/]: {leaves}, noised; and a yes or a no")
    epsilon = planned.epsilon()
    cost = "no privacy at all" if epsilon is None else f"ε = {epsilon:.4g} at δ = {planned.delta:g}"
    cap = place.site.limits.max_epsilon
    console.print(f"[bold]What it would cost[/]: {cost}, of {cap:g} for the life of your data")
    console.print(f"[bold]Whom you would trust to ask[/]: {place.coordinator.address}, key")
    console.print(f"    {place.coordinator.identity.fingerprint}", highlight=False)
    console.print("Compare these digits with the coordinator's by phone before you approve.")
    console.print(f"[bold]Digest[/] {study.digest}", highlight=False, soft_wrap=True)


def _said(text: str) -> str:
    """Return a coordinator's words on one line, so that they can't pass for ours."""
    return escape(plain(text))


def accept_rotation(place: Place, path: Path, *, ask: bool) -> dict[str, Any]:
    """Pin a coordinator's new key, which the old one signed.

    Raises:
        InputError: it is no statement, or not by the key that is pinned.
        RefusedError: the person says no.
    """
    pinned = place.coordinator
    try:
        new = Rotation.read(path).verified(pinned.identity)
    except InputError as error:
        raise InputError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from None
    if ask:
        typer.echo(f"old key: {pinned.identity.fingerprint}\nnew key: {new.fingerprint}", err=True)
        if not typer.confirm("Compared by phone, and to be trusted from now on?", err=True):
            raise RefusedError(Refusal.REQUEST_INVALID, f"{path}: not accepted")
    changed = pinned.model_copy(update={"key": new.text})
    with place.as_owner(), contextlib.closing(EventLog(place.events)) as events:
        # First: a key that no log tells of must not be trusted.
        events.note("rotated", old=pinned.identity.id, new=new.id)
        pin(place.pinned, changed)
    return {"old": pinned.identity.fingerprint, "new": new.fingerprint}


def prepare(invitation: Invitation, answers: Answers, folder: Path) -> Place:
    """Make the site's folder with its keys and a commented `site.yaml`; one that is there is kept.

    A `site.yaml` that nobody has changed, and under which nothing was approved, gives way to new
    answers: the first may have been wrong.

    Raises:
        InputError: the folder holds something else, or the answers make no valid `site.yaml`.
    """
    place = Place(folder.resolve())
    _expect_ours(place, folder)
    text = draft(invitation, answers)
    Site.parse(yaml.safe_load(text), name=str(place.config), base=place.path)
    if place.config.exists() and place.site.site != invitation.site:
        raise InputError(f"{invitation.site}: {place.config} is of site {place.site.site}")
    courier, secret = user(answers.courier_user), passphrase()
    _make(place.path, answers.data)
    # Whoever owns the folder could have put links in it: from here on, root acts as its owner.
    with acting_as(Owner.of(place.path)):
        for made in (place.state, place.courier, place.work, place.run, place.logs):
            made.mkdir(mode=0o700, exist_ok=True)
        place.check()
        # Searchable, so that the courier finds its own folders; all others in it are closed.
        place.path.chmod(0o711)
        install_bundle(place.flower)
        _write(place, text)
        if not place.identity.exists():
            _make_identity(place.identity, secret)
        _settle_node_key(place, invitation)
        _pin(place, invitation.coordinator)
    place.settle(courier)
    return Place.open(folder)


def _expect_ours(place: Place, folder: Path) -> None:
    """Raise `InputError` for a folder that holds what no join, ended or broken off, has made."""
    if not place.path.exists() or place.config.exists():
        return
    ours = {each.name for each in (place.state, place.courier, place.run, place.logs)}
    found = {each.name for each in place.path.iterdir()}
    if any(name not in ours and not name.startswith(f".{place.config.name}.") for name in found):
        raise InputError(f"{folder}: expected no folder, an empty one, or one that joined before")


def _write(place: Place, text: str) -> None:
    """Write `site.yaml`, unless a person has changed the one that is there, or approved by it."""
    mark = place.state / "drafted"
    if place.config.exists():
        untouched = mark.exists() and mark.read_text() == _sha256(place.config.read_bytes())
        if not untouched or (place.state / "ledger.db").exists():
            return
    write_atomically(mark, _sha256(text.encode()).encode())
    write_atomically(place.config, text.encode())
    place.config.chmod(0o600)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make(folder: Path, data: Path) -> None:
    """Make a site's folder; where root does, it is then the records' owner's, who is the vault's.

    Raises:
        InputError: the folder is somebody else's.
    """
    made = not folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() != 0 or not data.exists():
        return
    owner, found = data.stat(), folder.lstat()
    if found.st_uid == owner.st_uid:
        return
    if found.st_uid != 0 or not (made or not any(folder.iterdir())):
        raise InputError(
            f"{folder}: belongs to user {found.st_uid}, and the records to user {owner.st_uid}; "
            "name another folder"
        )
    give(folder, owner.st_uid, owner.st_gid, 0o711)


def _make_identity(path: Path, secret: bytes | None) -> None:
    """Make the site's key, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    SigningKey.generate().save(fresh, secret)
    fresh.rename(path)
    sync_folder(path.parent)


def _settle_node_key(place: Place, invitation: Invitation) -> None:
    """Make a new key for each invitation, and keep it: the edge binds it to the token."""
    mark = place.courier / "invitation"
    token = _sha256(invitation.token.encode())
    if place.node_key.exists() and mark.exists() and mark.read_text() == token:
        return
    place.node_key.unlink(missing_ok=True)
    _make_node_key(place.node_key)
    write_atomically(mark, token.encode())


def _pin(place: Place, coordinator: Coordinator) -> None:
    if place.pinned.exists() and place.coordinator.key != coordinator.key:
        before, now = place.coordinator.identity.fingerprint, coordinator.identity.fingerprint
        raise InputError(
            f"{place.pinned}: the key {before} is pinned; this invitation's is {now}. If the old "
            "was compromised, or the coordinator is to change, remove the file and join again"
        )
    pin(place.pinned, coordinator)
    place.pinned.chmod(0o600)
    pin(place.courier / "coordinator.json", coordinator)
    write_atomically(place.courier / "ca.pem", coordinator.ca.encode())


def _make_node_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    write_new(fresh, pem)
    fresh.rename(path)
    sync_folder(path.parent)


def draft(invitation: Invitation, answers: Answers) -> str:
    """Return the text of `site.yaml`, commented, for a person to look over."""
    study = invitation.contract
    held_out = answers.held_out
    if held_out is None:
        held_out = 0.1 if study.evaluated else 0.0
    source: dict[str, Any] = {"path": str(answers.data.resolve())}
    for key in ("label", "input", "unit"):
        value = {"label": answers.label, "input": answers.input, "unit": answers.unit}[key]
        if value is not None:
            source[key] = value
    values = {
        "site": json.dumps(invitation.site),
        "data": yaml.safe_dump(
            source, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False
        ).strip(),
        "units": answers.units,
        "held_out": held_out,
        "max_epsilon": _cap(study, answers.max_epsilon),
        "delta": max(1e-9, 2 * study.privacy.delta),
        "public": "true" if answers.public else "false",
        "isolation": answers.isolation,
        "courier_user": json.dumps(answers.courier_user),
        "seed": "null" if answers.seed is None else answers.seed,
    }
    return _SITE.format_map(values)


def _cap(study: Study, asked: float | None) -> float:
    if asked is not None:
        return asked
    epsilon = plan(study).epsilon() or 1.0
    if math.isinf(epsilon):
        raise InputError("--max-epsilon: missing; this study has hardly any noise, and no finite ε")
    # Equal events priced in another order differ in the last digits.
    return math.ceil(epsilon * 1000 * (1 + 1e-6)) / 1000


_SITE = """\
# What this site gives and allows. It is yours: no coordinator can change it, and nothing that one
# sends counts against it. After a change: veilgraft site check, and start again.
site: {site}

# The records. They are read by the vault alone, a process without network.
data: {data}

# The number of people or records that you declare, a round one. It stands in the arithmetic in the
# place of the real number, which would show through.
units: {units}

# The share that models are evaluated on and never trained on; fixed for the life of the data.
held_out: {held_out}

# In your own words, for the record.
consent: ""
anonymisation: ""

limits:
  # What may ever be spent, over all studies and for the life of the data. A study that would go
  # beyond it is refused before it starts.
  max_epsilon: {max_epsilon}
  delta: {delta!r}
  min_units: 1

# True only where nobody's privacy is at stake; then, and only then, may a study run without noise,
# or with a seed.
data_is_public: {public}
seed: {seed}

# full: private records are served only where the vault has no network, and the courier is a user of
# its own who can't read what the vault reads. reduced: you accept less; the statement of privacy
# that comes with the model says so.
isolation: {isolation}
courier_user: {courier_user}

# Answers leave at multiples of so many seconds, so that the time they took tells little.
reply_seconds: 0.5

device: auto

# What trains heads: auto, the fused engine wherever its proof reaches; or opacus, the reference.
engine: auto
state: state
"""

"""The coordinator's folder over its life: made, looked at, and who may take part.

`conductor` runs it. Each function returns facts for the command line to print.
"""

import base64
import ipaddress
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from veilgraft.durable import give, sync_folder, write_atomically
from veilgraft.errors import InputError
from veilgraft.events import EventLog, Kind
from veilgraft.identity import PublicKey, SigningKey
from veilgraft.invitation import Coordinator, Invitation, Rotation
from veilgraft.study import Study
from veilgraft_deploy import provision, supervisor
from veilgraft_deploy.control import Control, Unreachable
from veilgraft_server import checkpoint
from veilgraft_server.folder import Folder, Settings, readable
from veilgraft_server.metrics import Status
from veilgraft_server.registry import Member, Registry

PORT = 9443
INVITATION_SECONDS = 14 * 24 * 3600
STOP_SECONDS = 30.0

_HEADER = """\
# A coordinator, made by `veilgraft coordinator init`. Sites know host and port from their
# invitations, and the server's certificate names the host: both are to stay as they are.
#   listen        the address that the edge binds on this machine
#   users         apart: where root starts it, edge and SuperLink become the user edge_user, and
#                 what holds the signing key executor_user; one: they don't
"""


def init(
    folder: Path,
    study_path: Path,
    host: str,
    sites: Sequence[str],
    port: int = PORT,
    passphrase: bytes | None = None,
) -> dict[str, Any]:
    """Make a coordinator's folder, and an invitation for each site.

    Raises:
        InputError: something can't be used; `folder` is then as it was.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a folder that is not there yet, or an empty one")
    study = Study.read(study_path)
    _check_parties(study, sites)
    settings = Settings.parse(
        {"name": study.name, "host": host, "port": port, "sites": list(sites), "dim": 1},
        name="coordinator",
    )
    _check_host(settings.host)
    settings = settings.model_copy(update={"dim": _dim(study, study_path)})
    _check_evaluation(study)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with readable():
            key = _fill(Folder(fresh), study, settings, passphrase)
        fresh.chmod(0o755)
        fresh.rename(folder)
    except BaseException:
        _remove(fresh)
        raise
    sync_folder(folder.parent)
    return {
        "folder": str(folder),
        "study": study.digest,
        "fingerprint": key.fingerprint,
        "key": key.text,
        "address": f"{settings.host}:{settings.port}",
        "invitations": {site: str(Folder(folder).invitation(site)) for site in sites},
        "protected by a passphrase": passphrase is not None,
    }


def invite(folder: Path, site: str) -> dict[str, Any]:
    """Write a new invitation for `site`; what it enrolled with before is forgotten."""
    place = Folder.open(folder)
    weights = place.study.aggregation.weights
    if weights and site not in weights:
        raise InputError(f"{site}: aggregation.weights does not name this site")
    with _members(place) as registry:
        made = _invite(place, registry, place.study, site, public_key(place))
    _admit(place, site)
    _note(place, "invited", site=site, expires=made.expires)
    return {"site": site, "invitation": str(place.invitation(site)), "expires": made.expires}


def _admit(place: Folder, site: str) -> None:
    """Let a site take part, with whatever key it will enrol with."""
    if site not in place.settings.sites:
        sites = (*place.settings.sites, site)
        _configure(place, place.settings.model_copy(update={"sites": sites}))
    if place.identities.exists():
        known = json.loads(place.identities.read_text())
        known.pop(site, None)
        owner = place.identities.stat()
        write_atomically(place.identities, json.dumps(known).encode())
        give(place.identities, owner.st_uid, owner.st_gid, 0o600)


def _configure(place: Folder, settings: Settings) -> None:
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    with readable():
        write_atomically(place.config, (_HEADER + text).encode())


def change(folder: Path, study_path: Path) -> dict[str, Any]:
    """Put another study in the place of the one that was run; the same sites and keys go on.

    What the last run left is kept under `runs`. At its next start the coordinator sends the study
    to the sites, each of which serves it once a person there has approved it.

    Raises:
        InputError: the coordinator runs, or the study can't be used; nothing was changed.
    """
    place = Folder.open(folder)
    if supervisor.running(place.pid_file) is not None:
        raise InputError(f"{folder}: is running; stop it before its study changes")
    study = Study.read(study_path)
    with _members(place) as registry:
        sites = [member.site for member in registry.members() if not member.revoked]
    _check_parties(study, sites)
    dim = _dim(study, study_path)
    _check_evaluation(study)
    with readable(), tempfile.TemporaryDirectory(dir=place.path, prefix=".study.") as staged:
        fresh = Folder(Path(staged))
        _copy_study(fresh, study)
        kept = _archive(place)
        # A crash from here on is told at the next start, and mended by giving the study again.
        place.evaluation.unlink(missing_ok=True)
        shutil.rmtree(place.path / "backbone", ignore_errors=True)
        (fresh.path / "backbone").rename(place.path / "backbone")
        (fresh.path / "study.yaml").rename(place.path / "study.yaml")
        settings = place.settings.model_copy(update={"name": study.name, "dim": dim})
        _configure(place, settings)
    _reinvite(place, {"study": study.canonical})
    _note(place, "replaced", study=study.digest)
    return {"study": study.digest, "sites": sites, "last run": str(kept)}


def _archive(place: Folder) -> Path:
    """Move what the last run left out of the way."""
    (place.path / "runs").mkdir(mode=0o755, exist_ok=True)
    kept = place.path / "runs" / str(1 + sum(1 for _ in (place.path / "runs").iterdir()))
    if place.run.exists():
        place.run.rename(kept)
    place.run.mkdir(mode=0o755, exist_ok=True)
    return kept


def revoke(folder: Path, site: str) -> dict[str, Any]:
    """Shut a site out, from its next message on."""
    place = Folder.open(folder)
    with _members(place) as registry:
        registry.revoke(site)
    place.invitation(site).unlink(missing_ok=True)
    _note(place, "revoked", site=site)
    return {"site": site, "revoked": True}


def rotate(folder: Path, passphrase: bytes | None = None) -> dict[str, Any]:
    """Replace the signing key, and have the old one say so in `rotation-N.yaml`.

    All statements stay: a site that was away approves one after the other. So do the old keys, as
    `signing.pem.N`. Invitations not yet used name the new key.

    Raises:
        InputError: the coordinator runs, or the key can't be read.
    """
    place = Folder.open(folder)
    if supervisor.running(place.pid_file) is not None:
        raise InputError(f"{folder}: is running; stop it before its key changes")
    path = place.signing_key
    owner = path.stat()
    with acting_as(owner.st_uid):
        old = SigningKey.load(path, passphrase)
    new = SigningKey.generate()
    fresh = path.with_name(f".signing.pem.{secrets.token_hex(4)}")
    new.save(fresh, passphrase)
    os.chown(fresh, owner.st_uid, owner.st_gid)
    kept = _next(path)
    said = place.path / f"rotation-{kept.suffix.removeprefix('.')}.yaml"
    text = yaml.safe_dump(_statement(old, new.public).model_dump(), sort_keys=False)
    # First: a key that is in use always has its statement.
    write_atomically(said, text.encode())
    os.link(path, kept)
    fresh.replace(path)
    sync_folder(place.path)
    _writepublic_key(place, new.public)
    _reinvite(place, {"coordinator": _address(place, new.public)})
    _note(place, "rotated", old=old.public.text, new=new.public.text)
    return {
        "fingerprint": new.public.fingerprint,
        "key": new.public.text,
        "statement": str(said),
        "old key": str(kept),
    }


def finish_rotation(place: Folder, key: PublicKey) -> bool:
    """End a rotation that was broken off when the key had changed; return whether one was."""
    before = public_key(place)
    for path in place.path.glob("rotation-*.yaml"):
        statement = Rotation.read(path)
        if statement.new == key.text and statement.old == before.text:
            statement.verified(before)
            _writepublic_key(place, key)
            _reinvite(place, {"coordinator": _address(place, key)})
            return True
    return False


def status(folder: Path) -> dict[str, Any]:
    """Return how sites, rounds and processes stand."""
    place = Folder.open(folder)
    study, running = place.study, supervisor.running(place.pid_file)
    with _members(place) as registry:
        members = registry.members()
    online = _online(place) if running else set()
    rounds = history(place)
    return {
        "study": {"name": study.name, "digest": study.digest},
        "fingerprint": public_key(place).fingerprint,
        "running": running is not None,
        "processes": {name: pid for name, (pid, _) in running["children"].items()}
        if running
        else {},
        "users": "apart" if place.separated else "one for all parts",
        "sites": {member.site: _standing(member, online) for member in members},
        "quorum": study.aggregation.quorum,
        "rounds": {"done": len(rounds), "planned": study.training.rounds},
        "epsilon": rounds[-1].epsilon if rounds else None,
        "state": _state(place),
    }


def stop(folder: Path) -> dict[str, Any]:
    """End all processes; returns once none is left, after 30 s at most."""
    place = Folder.open(folder)
    return {"was running": supervisor.stop(place.pid_file, STOP_SECONDS)}


def _statement(old: SigningKey, new: PublicKey) -> Rotation:
    unsigned = Rotation(old=old.public.text, new=new.text, signature="0" * 128)
    signature = old.sign("rotation", unsigned.text).hex()
    return unsigned.model_copy(update={"signature": signature})


def _check_parties(study: Study, sites: Sequence[str]) -> None:
    weights, quorum = study.aggregation.weights, study.aggregation.quorum
    if not sites or len({site.casefold() for site in sites}) < len(sites):
        raise InputError(f"--sites: expected names, each once, got {','.join(sites) or 'none'}")
    if weights and set(weights) != set(sites):
        raise InputError(
            f"--sites: expected the sites of aggregation.weights, {','.join(sorted(weights))}, "
            f"got {','.join(sorted(sites))}"
        )
    if quorum > len(sites):
        raise InputError(
            f"--sites: expected at least {quorum}, the study's aggregation.quorum, got {len(sites)}"
        )


def _check_host(host: str) -> None:
    """Refuse an address that says where to listen rather than where to be found."""
    try:
        unspecified = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        unspecified = False
        if ":" in host:
            raise InputError(
                f"--host: expected a name or an address without a port, got {host}"
            ) from None
    if unspecified:
        raise InputError(f"--host: expected the name or address that sites reach, got {host}")


def _dim(study: Study, study_path: Path) -> int:
    from veilgraft.model.backbone import FrozenBackbone

    if study.backbone.path is None:
        raise InputError(f"{study_path}: backbone.path: missing; the coordinator sends the files")
    return FrozenBackbone.open(study.backbone.path, study.backbone).dim


def _check_evaluation(study: Study) -> None:
    if study.evaluation.data is None:
        return
    from veilgraft_client import dataset

    dataset.read(study.evaluation.data, study.task, modality=study.backbone.modality)


def _fill(place: Folder, study: Study, settings: Settings, passphrase: bytes | None) -> PublicKey:
    for name in ("tls", "flower", "run", "logs"):
        (place.path / name).mkdir(mode=0o755)
    (place.path / "invitations").mkdir(mode=0o700)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    place.config.write_text(_HEADER + text, encoding="utf-8")
    _copy_study(place, study)
    provision.authority(place.tls, settings.host)
    provision.certify(place.tls, settings.host)
    provision.install_bundle(place.home)
    key = SigningKey.generate()
    key.save(place.signing_key, passphrase)
    _writepublic_key(place, key.public)
    with os.fdopen(os.open(place.secret, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(secrets.token_hex(32).encode())
    _note(place, "initialised", study=study.digest, key=key.public.text)
    with _members(place) as registry:
        for site in settings.sites:
            made = _invite(place, registry, study, site, key.public)
            _note(place, "invited", site=site, expires=made.expires)
    return key.public


def _copy_study(place: Folder, study: Study) -> None:
    assert study.backbone.path is not None
    shutil.copytree(study.backbone.path, place.path / "backbone", symlinks=True)
    for path in (place.path / "backbone").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    values = study.model_dump(mode="json", exclude={"simulation"}, exclude_none=True)
    values["backbone"]["path"] = "backbone"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path = place.path / "study.yaml"
    path.write_text(f"# {study.digest}\n{text}", encoding="utf-8")
    if Study.read(path).digest != study.digest:
        raise RuntimeError("the study's copy is another study")


def _invite(
    place: Folder, registry: Registry, study: Study, site: str, key: PublicKey
) -> Invitation:
    values = {
        "site": site,
        "coordinator": _address(place, key).model_dump(),
        "token": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("="),
        "expires": int(time.time()) + INVITATION_SECONDS,
        "study": study.canonical,
    }
    made = Invitation.parse(values, name=f"invitation of {site}")
    registry.invite(site, made.token, made.expires)
    made.write(place.invitation(site))
    return made


def _address(place: Folder, key: PublicKey) -> Coordinator:
    settings = place.settings
    return Coordinator(
        host=settings.host, port=settings.port, ca=place.ca.read_text(), key=key.text
    )


def _reinvite(place: Folder, changes: Mapping[str, Any]) -> None:
    """Change what invitations say that were not used yet."""
    with _members(place) as registry:
        waiting = [m.site for m in registry.members() if m.identity is None and not m.revoked]
    for site in waiting:
        path = place.invitation(site)
        if path.exists():
            Invitation.read(path).model_copy(update=dict(changes)).write(path)


@contextmanager
def _members(place: Folder) -> Iterator[Registry]:
    with closing(Registry(place.registry)) as registry:
        yield registry


def _note(place: Folder, kind: Kind, **facts: object) -> None:
    with closing(EventLog(place.events)) as log:
        log.note(kind, **facts)


def public_key(place: Folder) -> PublicKey:
    """Return the public key, which needs no passphrase."""
    return PublicKey.parse((place.path / "signing.pub").read_text().strip())


def _writepublic_key(place: Folder, key: PublicKey) -> None:
    """Keep the public key beside the private one, which may have a passphrase."""
    with readable():
        write_atomically(place.path / "signing.pub", f"{key.text}\n".encode())


def _next(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return kept


def _online(place: Folder) -> set[int]:
    try:
        with Control(place.superlink_port(), place.ca) as control:
            return control.online()
    except (Unreachable, InputError):
        return set()


def _standing(member: Member, online: set[int]) -> str:
    if member.revoked:
        return "revoked"
    if member.node_id is None:
        return "invited" if member.expires > time.time() else "invitation expired"
    return "online" if member.node_id in online else "enrolled"


def history(place: Folder) -> tuple[checkpoint.Round, ...]:
    """Return the rounds that are done."""
    if not place.checkpoint.exists():
        return ()
    return checkpoint.load(place.checkpoint, place.study.digest).history


def _state(place: Folder) -> str | None:
    if place.report.exists():
        return "finished"
    if place.outcome.exists():
        return str(json.loads(place.outcome.read_text())["error"])
    found = Status.load(place.status)
    return found.state if found else None


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Act as a file's owner, as keys are read by their owner alone; for root, else without use."""
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def _remove(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o700)
    shutil.rmtree(folder)

"""`veilgraft site check`: what is wrong at a site, in plain words, and what to do.

The records are read by a process of their own, as the vault will be: without network where that
can be had. The connection is tried by this one, which reads none.
"""

import email.utils
import json
import os
import subprocess
import sys
import time
import urllib.error
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veilgraft.errors import InputError
from veilgraft.identity import SigningKey, passphrase
from veilgraft.invitation import Coordinator
from veilgraft.plan import plan
from veilgraft_client.bundles import Bundles
from veilgraft_client.separation import Separation, courier_command, vault_command, would_hold
from veilgraft_client.studies import Studies
from veilgraft_deploy.enrolling import FAILURES, opener
from veilgraft_deploy.office import secrets, shared
from veilgraft_deploy.place import Place

AHEAD_SECONDS, BEHIND_SECONDS = 6, 300
"""By which Flower lets a site's clock be off."""

CONNECT_SECONDS = 15.0
EXAMINE_SECONDS = 3600.0
HEALTH_PATH = "/veilgraft/health"


def check(place: Place, study: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return what was found, and each thing that is wrong with what to do.

    Args:
        study: a study file; by default all that were approved. What a coordinator merely proposed
            is read where a person names it: to price a stranger's study may take long.
    """
    problems: list[str] = []
    separations = _separations(place)
    facts: dict[str, Any] = {
        "site": place.site.site,
        "isolation": place.site.isolation,
        "separations": [asdict(each) for each in separations],
    }
    if place.site.isolation == "full" and not place.site.data_is_public:
        problems += [f"{each.name}: {each.reason}" for each in separations if not each.holds]
    problems += _permissions(place) + _reach(place)
    if place.pinned.exists():
        facts["connection"], wrong = connection(place.coordinator)
        problems += wrong
    network = separations[0].holds
    facts["studies"] = []
    for each in [study] if study else _approved(place):
        found, wrong = _examined(place, each, without_network=network)
        facts["studies"] += [found] if found else []
        problems += wrong
    return facts, problems


def _separations(place: Place) -> tuple[Separation, ...]:
    courier = place.courier_user
    uid, groups = courier or (None, frozenset())
    if os.geteuid() not in (0, place.owner.uid):
        raise InputError(
            f"{place.path}: belongs to user {place.owner.uid}; expected that user or root, got "
            f"user {os.geteuid()}"
        )
    return would_hold(
        secrets(place), place.owner, uid, groups, state=place.state, shared=shared(place)
    )


def _permissions(place: Place) -> list[str]:
    problems = []
    with place.as_owner():
        try:
            if place.identity.exists():
                SigningKey.load(place.identity, passphrase())
        except InputError as error:
            problems.append(str(error))
        problems += [
            f"{path}: others may change it; chmod 600 {path}"
            for path in (place.config, place.pinned)
            if path.exists() and path.stat().st_mode & 0o022
        ]
        probe = place.state / ".probe"
        try:
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            problems.append(f"{place.state}: can't be written: {error.strerror}")
    return problems


def _reach(place: Place) -> list[str]:
    """Return what keeps the courier's user from running at all."""
    found = place.courier_user
    if os.geteuid() != 0 or found is None:
        return []
    prefix = courier_command([], found[0], min(found[1]))
    for needed in (sys.executable, str(Path(__file__))):
        test = [*prefix, "test", "-r", needed]
        if subprocess.run(test, check=False, capture_output=True).returncode:  # noqa: S603
            return [
                f"{needed}: user {found[0]} can't read it; install Python and Veilgraft where all "
                "users may enter, such as /opt"
            ]
    return []


def connection(coordinator: Coordinator) -> tuple[dict[str, Any], list[str]]:
    """Try the coordinator's edge; return what was found and what is wrong."""
    address, edge = coordinator.address, opener(coordinator)
    try:
        url = f"https://{address}{HEALTH_PATH}"
        with edge.open(url, timeout=CONNECT_SECONDS) as answer:
            there, here = answer.headers.get("date"), time.time()
    except urllib.error.HTTPError as error:
        return {"reached": False}, [f"{address}: answers, but not as a coordinator: {error.code}"]
    except FAILURES as error:
        reason = getattr(error, "reason", error)
        return {"reached": False}, [
            f"{address}: can't be reached ({reason}); open outgoing TCP to it in the firewall, and "
            "ask whether the coordinator runs"
        ]
    try:
        ahead = here - email.utils.parsedate_to_datetime(there).timestamp()
    except (TypeError, ValueError, OverflowError):
        return {"reached": True}, []
    facts = {"reached": True, "clock_ahead_seconds": round(ahead, 1)}
    # The date is whole seconds, cut off.
    if ahead - 1 > AHEAD_SECONDS or -ahead > BEHIND_SECONDS:
        return facts, [
            f"this machine's clock is {ahead:+.0f} s from the coordinator's; Flower allows "
            f"{AHEAD_SECONDS} s ahead and {BEHIND_SECONDS} s behind: set up NTP"
        ]
    return facts, []


def named(place: Place, study: str) -> Path:
    """Return the file of a study that a person names, by its path or by its digest."""
    if not study.startswith("sha256:"):
        return Path(study)
    with place.as_owner():
        known = Studies(place.site.state)
        return known.file(known.find(study).digest)


def price(place: Place, digest: str) -> dict[str, Any]:
    """Return what a person should know of a proposed study before approving it: also its ε."""
    with place.as_owner():
        study = Studies(place.site.state).find(digest)
    planned = plan(study)
    return {
        "study": digest,
        "name": study.name,
        "purpose": study.purpose,
        "rounds": study.training.rounds,
        "leaves": {kind: count for kind, (count, _) in planned.releases.items()},
        "epsilon": planned.epsilon(),
        "delta": planned.delta,
        "max_epsilon": place.site.limits.max_epsilon,
    }


def _approved(place: Place) -> list[Path]:
    with place.as_owner():
        studies = Studies(place.site.state)
        return [studies.file(digest) for digest in studies.approved()]


def _examined(
    place: Place, study: Path, *, without_network: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    inner = [sys.executable, "-P", "-m", "veilgraft_deploy.cli", "site", "examine"]
    inner += [str(place.config), "--study", str(study), "--json"]
    backbone = _backbone(place, study)
    inner += ["--backbone", str(backbone)] if backbone else []
    command = vault_command(inner, place.owner)
    if not without_network:
        command = command[command.index("setpriv") :]
    env = {"PATH": os.defpath, "HOME": str(place.state), "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(  # noqa: S603 - our own argv, no shell
            command,
            env=env,
            capture_output=True,
            text=True,
            timeout=EXAMINE_SECONDS,
            check=False,
            cwd=place.state,
        )
    except subprocess.TimeoutExpired:
        return None, [f"the records could not be read within {EXAMINE_SECONDS:g} s"]
    if done.returncode:
        told = [line.removeprefix("veilgraft: ") for line in done.stderr.splitlines() if line]
        return None, told or [f"the records can't be read (exit {done.returncode})"]
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts, [facts["refused"]] if facts["refused"] else []


def _backbone(place: Place, study: Path) -> Path | None:
    with place.as_owner():
        bundles = Bundles(place.site.state / "backbones", place.site.limits.max_backbone_bytes)
        digest = Studies.read(study).backbone.digest
        return bundles.path(digest) if bundles.has(digest) else None

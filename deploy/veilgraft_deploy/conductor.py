"""`veilgraft coordinator start`: SuperLink, executor and edge kept alive, and the run with them."""

import contextlib
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from veilgraft.durable import write_atomically
from veilgraft.errors import InputError, VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import PASSPHRASE_FILE, SigningKey, passphrase
from veilgraft_deploy import progress, provision, supervisor
from veilgraft_deploy.control import Control
from veilgraft_deploy.coordinator import STOP_SECONDS, acting_as, finish_rotation, public_key
from veilgraft_deploy.progress import Live, Watcher
from veilgraft_deploy.supervisor import Service
from veilgraft_deploy.watch import Conductor
from veilgraft_server.folder import Folder, User, readable

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
PROBE_SECONDS = 2.0


def start(
    folder: Path, *, as_json: bool = False, passphrase_file: Path | None = None
) -> dict[str, Any] | None:
    """Run the coordinator until the study is done, or until it is told to stop.

    Prints progress to stderr and the results to stdout.

    Returns:
        The report; None where it was stopped before.

    Raises:
        InputError: it is running already, or the folder or the key can't be used.
        VeilgraftError: the run was given up, with its exit code (4: no quorum); or a part does
            not come up.
    """
    place = Folder.open(folder)
    if not place.report.exists():
        _check(place)
        passphrase = read_passphrase(place, passphrase_file)
        _check_key(place, passphrase)
        with _passphrase_file(place, passphrase) as kept, _watching() as watcher:
            with readable():
                _prepare(place, watcher)
            conductor = Conductor(place, watcher)
            services = _services(place, kept)
            supervisor.supervise(services, place.pid_file, tick=conductor)
    return _concluded(place, as_json)


def prepare(folder: Path) -> None:
    """Bring the folder up to date before its parts are started one by one; none may run.

    For containers and units, which then run `parts` and `conduct`.
    """
    place = Folder.open(folder)
    _ = place.study
    with _watching() as watcher, readable():
        _prepare(place, watcher)


def conduct(folder: Path, *, as_json: bool = False) -> dict[str, Any] | None:
    """Start and watch the run of parts that something else keeps alive; ends as `start` does.

    Needs to write nothing, and no key.
    """
    place = Folder.open(folder)
    with _watching() as watcher:
        conductor = Conductor(place, watcher)
        while not place.report.exists() and conductor():
            time.sleep(LOOK_SECONDS)
    return _concluded(place, as_json)


def read_passphrase(place: Folder, file: Path | None = None) -> bytes | None:
    """Return the signing key's passphrase: from a file, else asked for at a terminal.

    The file is `file`, or what VEILGRAFT_PASSPHRASE_FILE names. None where the key has none.

    Raises:
        InputError: the key has one, and it can't be had.
    """
    if b"ENCRYPTED" not in place.signing_key.read_bytes()[:64]:
        return None
    if (given := passphrase(file)) is not None:
        return given
    if not sys.stdin.isatty():
        raise InputError(
            f"{place.signing_key}: expected its passphrase, from --passphrase-file or "
            f"{PASSPHRASE_FILE}"
        )
    answer: str = typer.prompt("passphrase of the signing key", hide_input=True, err=True)
    return answer.encode()


class Lines:
    """Progress for a file or a pipe: a line for each thing."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print one sentence."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """Print how far it is."""
        self.say(f"{what}: {done} of {total}  {note}")


@contextlib.contextmanager
def _watching() -> Iterator[Watcher]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console) as live:
        yield live


def _check(place: Folder) -> None:
    """Raise `InputError` where the coordinator runs, or its study can't be read."""
    running = supervisor.running(place.pid_file)
    if running is not None:
        raise InputError(f"{place.path}: is already running (pid {running['pid']})")
    _ = place.study
    for user in (place.edge_user, place.executor_user):
        if user is not None:
            _check_reach(place, user)


def _check_reach(place: Folder, user: User) -> None:
    """Raise `InputError` where another user could not so much as start."""
    for needed in (Path(sys.executable), Path(__file__), place.config):
        test = ["/bin/sh", "-c", 'test -r "$1"', "sh", str(needed)]
        if subprocess.run([*become(user), *test], check=False).returncode:  # noqa: S603
            raise InputError(
                f"{needed}: user {user.uid} can't read it: let all users enter the folders above "
                f"it, or say users: one in {place.config.name}"
            )


def _check_key(place: Folder, passphrase: bytes | None) -> None:
    with acting_as(place.signing_key.stat().st_uid):
        key = SigningKey.load(place.signing_key, passphrase)
    if key.public != public_key(place) and not finish_rotation(place, key.public):
        raise InputError(f"{place.signing_key}: expected the key that signing.pub names")


def _prepare(place: Folder, watcher: Watcher) -> None:
    """Bring the folder up to date; nothing of it runs yet."""
    # After a supervisor that was killed, its children may still run.
    supervisor.stop(place.pid_file, STOP_SECONDS)
    if provision.renew(place.tls, place.settings.host):
        log.info("the server's certificate was renewed")
    provision.install_bundle(place.home)
    measure(place, watcher)
    place.outcome.unlink(missing_ok=True)
    place.status.unlink(missing_ok=True)
    place.settle_port()
    with contextlib.closing(EventLog(place.events)) as events:
        events.note("started", study=place.study.digest)
    place.hand_over()


def measure(place: Folder, watcher: Watcher) -> None:
    """Make the features of the study's public records, where it names some."""
    study, source = place.study, place.study.evaluation.data
    if source is None or place.evaluation.exists():
        return
    import torch
    from safetensors.torch import save

    from veilgraft.model import features as contract
    from veilgraft.model.backbone import FrozenBackbone
    from veilgraft_client import dataset

    assert study.backbone.path is not None
    modality = study.backbone.modality
    records = dataset.read(source, study.task, modality=modality, tell=watcher.say)
    backbone = FrozenBackbone.open(study.backbone.path, study.backbone)
    with tempfile.TemporaryDirectory(dir=place.path) as folder:
        values = contract.FeatureStore(Path(folder)).get(
            study.backbone,
            lambda: backbone,
            records.inputs,
            records.fingerprint,
            progress=lambda done, total: watcher.step("features", done, total),
        )
        made = contract.units(values, torch.from_numpy(records.targets))
    tensors = {"values": made.values, "mask": made.mask, "targets": made.targets}
    write_atomically(place.evaluation, save({k: v.contiguous() for k, v in tensors.items()}))


def _services(place: Folder, passphrase: Path | None) -> list[Service]:
    secret = {PASSPHRASE_FILE: str(passphrase)} if passphrase else {}
    return [
        _service(place, "superlink", place.edge_user, {}, lambda: _superlink_answers(place)),
        _service(place, "executor", place.executor_user, secret, None),
        _service(place, "edge", place.edge_user, {}, lambda: _edge_answers(place)),
    ]


def _service(
    place: Folder,
    part: str,
    user: User | None,
    env: dict[str, str],
    ready: Callable[[], bool] | None,
) -> Service:
    command = [sys.executable, "-P", "-m", "veilgraft_deploy.parts", part, str(place.path)]
    return Service(
        name=part,
        command=[*(become(user) if user else ()), *command],
        # Nothing that another user could write is a home, or is imported.
        env={"HOME": "/nonexistent", "PYTHONNOUSERSITE": "1", **env},
        log=place.logs / f"{part}.log",
        ready=ready,
    )


def become(user: User) -> list[str]:
    """Return what makes the command after it run as `user`, and die with its parent."""
    groups = ",".join(map(str, user.groups))
    return [
        "setpriv",
        f"--reuid={user.uid}",
        f"--regid={user.gid}",
        f"--groups={groups}" if groups else "--clear-groups",
        "--no-new-privs",
        # The change of user has cleared it.
        "--pdeathsig=KILL",
        "--",
    ]


def _superlink_answers(place: Folder) -> bool:
    with Control(place.superlink_port(), place.ca) as control:
        return control.answers()


def _edge_answers(place: Folder) -> bool:
    settings = place.settings
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.listen, settings.listen)  # noqa: S104
    context = ssl.create_default_context(cafile=place.ca)
    # Of this address, which the certificate need not name, only who signed it is asked.
    context.check_hostname = False
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        url = f"https://{here}:{settings.port}/veilgraft/health"
        with opener.open(url, timeout=PROBE_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def _passphrase_file(place: Folder, passphrase: bytes | None) -> Iterator[Path | None]:
    """Keep the passphrase in memory, where the executor finds it at each start."""
    if passphrase is None:
        yield None
        return
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
    folder = Path(tempfile.mkdtemp(prefix="veilgraft.", dir=memory if memory.is_dir() else None))
    path = folder / "passphrase"
    try:
        path.write_bytes(passphrase)
        path.chmod(0o400)
        if place.separated:
            for each in (path, folder):
                os.chown(each, place.settings.executor_user, -1)
        yield path
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()


def _concluded(place: Folder, as_json: bool) -> dict[str, Any] | None:
    """Print how it ended, and return the report where there is one."""
    if place.report.exists():
        report: dict[str, Any] = json.loads(place.report.read_text())
        if as_json:
            typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            console = Console()
            console.print(progress.table(report))
            console.print(f"run folder: {place.run}", highlight=False, soft_wrap=True)
        return report
    if place.outcome.exists():
        outcome = json.loads(place.outcome.read_text())
        error = VeilgraftError(str(outcome["error"]))
        error.exit_code = int(outcome["exit_code"])
        raise error
    return None

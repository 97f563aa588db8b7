"""The coordinator's folder and its processes, real ones, without a site."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tests.deploy.test_provision import hostile
from tests.system.command import written

from veilgraft.errors import InputError
from veilgraft.events import EventLog
from veilgraft.identity import PASSPHRASE_FILE, PublicKey, SigningKey
from veilgraft.invitation import Invitation, Rotation
from veilgraft.model.features import Features
from veilgraft.study import Study
from veilgraft_deploy import conductor, coordinator, processes, supervisor
from veilgraft_deploy.control import Control, Unreachable
from veilgraft_deploy.progress import Silent
from veilgraft_deploy.provision import Bundle, bundle
from veilgraft_server.folder import Folder
from veilgraft_server.registry import Registry

SITES = ("north", "south", "west")
WAIT_SECONDS = 40.0
START = (
    "import sys, pathlib; from veilgraft_deploy import conductor; from veilgraft.errors import *"
)
START += "\ntry: conductor.start(pathlib.Path(sys.argv[1]))"
START += "\nexcept VeilgraftError as e: print(e, file=sys.stderr); sys.exit(e.exit_code)"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one folder; tests work on copies of it, for a backbone takes seconds to open."""
    base = tmp_path_factory.mktemp("coordinator")
    study = written(base / "given", aggregation={"quorum": 2, "timeout": 600.0})
    coordinator.init(base / "made", study, "localhost", SITES)
    return base / "made"


def copied(made: Path, parent: Path, **settings: Any) -> Path:
    folder = parent / "coordinator"
    shutil.copytree(made, folder)
    path = folder / "coordinator.yaml"
    values = yaml.safe_load(path.read_text()) | {"port": free_port(), "listen": "127.0.0.1"}
    path.write_text(yaml.safe_dump(values | settings))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path, users="one")


def until(done: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@contextlib.contextmanager
def started(folder: Path, python: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [python, "-P", "-c", START, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        supervisor.stop(folder / "coordinator.pid", 20)
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def healthy(folder: Path) -> bool:
    place = Folder.open(folder)
    context = ssl.create_default_context(cafile=place.ca)
    connection = http.client.HTTPSConnection(
        "localhost", place.settings.port, timeout=5, context=context
    )
    with contextlib.suppress(OSError), closing(connection):
        connection.request("GET", "/veilgraft/health")
        return connection.getresponse().status == 200
    return False


def runs(folder: Path) -> bool:
    """Whether all is up and a Flower run was started."""
    with contextlib.suppress(OSError, InputError, Unreachable):
        place = Folder.open(folder)
        if healthy(folder):
            with Control(place.superlink_port(), place.ca) as control:
                return control.newest(bundle()) is not None
    return False


def children(folder: Path) -> dict[str, int]:
    running = supervisor.running(folder / "coordinator.pid") or {"children": {}}
    return {name: pid for name, (pid, _) in running["children"].items()}


def kinds(folder: Path) -> list[str]:
    with closing(EventLog(folder / "events.db")) as log:
        log.verify()
        return [note.kind for note in log.entries()]


def test_init_makes_keys_study_backbone_and_an_invitation_for_each_site(made: Path) -> None:
    place = Folder.open(made)
    assert Study.read(made / "study.yaml").backbone.path == made / "backbone"
    assert place.settings.dim == 64
    key = SigningKey.load(place.signing_key).public
    for site in SITES:
        path = place.invitation(site)
        invitation = Invitation.read(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert invitation.site == site
        assert invitation.coordinator.identity == key
        assert invitation.coordinator.ca == place.ca.read_text()
        assert invitation.contract.digest == place.study.digest
        assert 13.9 * 86400 < invitation.expires - time.time() < 14.1 * 86400
    for name in ("signing.pem", "tls/ca.key", "tls/server.key", "flower/executor.secret"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    assert kinds(made) == ["open", "initialised", "invited", "invited", "invited"]
    assert [path.name for path in made.parent.iterdir() if path.name[0] == "."] == []


def test_tokens_are_kept_hashed_alone(made: Path) -> None:
    stored = (made / "registry.db").read_bytes()
    for site in SITES:
        token = Invitation.read(Folder(made).invitation(site)).token
        assert token.encode() not in stored
        assert token not in (made / "events.db").read_bytes().decode(errors="replace")


DIGEST = "sha256:" + "0" * 64
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no sites": ({}, {"sites": []}, "--sites: expected names"),
    "a site twice": ({}, {"sites": ["a", "A"]}, "--sites: expected names"),
    "a site's name": ({}, {"sites": ["../a", "b"]}, "sites.0: expected text of the form"),
    "too few sites": ({}, {"sites": ["a"]}, "at least 2, the study's aggregation.quorum, got 1"),
    "other weights": (
        {"aggregation": {"weights": {"a": 1.0, "b": 1.0}}},
        {"sites": ["a", "c"]},
        "the sites of aggregation.weights, a,b, got a,c",
    ),
    "a host's name": ({}, {"host": "a b"}, "host: expected text of the form"),
    "a host with a port": ({}, {"host": "example.org:9443"}, "without a port"),
    "nowhere": ({}, {"host": "0.0.0.0"}, "the name or address that sites reach"),
    "a port": ({}, {"port": 70000}, "port: expected a number below 65536"),
    "another backbone": ({"backbone": {"digest": DIGEST}}, {}, "backbone.digest: expected"),
    "no evaluation data": (
        {"evaluation": {"data": {"path": "missing.csv"}, "data_is_public": True}},
        {},
        "missing.csv",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_sentence_and_leaves_no_folder(tmp_path: Path, name: str) -> None:
    sections, options, expected = BAD[name]
    sections = {"aggregation": {"quorum": 2, **sections.pop("aggregation", {})}, **sections}
    study = written(tmp_path / "given", **sections)
    given: dict[str, Any] = {"host": "localhost", "sites": ["a", "b"], **options}
    with pytest.raises(InputError) as caught:
        coordinator.init(tmp_path / "coordinator", study, **given)
    assert caught.value.exit_code == 2
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    study = written(tmp_path / "given" / "study")
    with pytest.raises(InputError, match="not there yet, or an empty one"):
        coordinator.init(tmp_path, study, "localhost", SITES)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_is_no_coordinators_folder_is_said_so(tmp_path: Path) -> None:
    asked: tuple[Callable[[Path], object], ...]
    asked = (coordinator.status, coordinator.stop, coordinator.rotate, conductor.start)
    for each in asked:
        with pytest.raises(InputError, match="expected a folder that"):
            each(tmp_path)


def test_a_new_invitation_replaces_the_old_one_and_a_revoked_site_is_out(folder: Path) -> None:
    place = Folder.open(folder)
    before = Invitation.read(place.invitation("north")).token
    coordinator.invite(folder, "north")
    after = Invitation.read(place.invitation("north"))
    assert after.token != before
    facts = coordinator.revoke(folder, "south")
    assert facts == {"site": "south", "revoked": True}
    assert not place.invitation("south").exists()
    assert coordinator.status(folder)["sites"] == {
        "north": "invited",
        "south": "revoked",
        "west": "invited",
    }
    with closing(Registry(place.registry)) as registry:
        assert {m.site: m.revoked for m in registry.members()}["south"]
    with pytest.raises(InputError, match="expected one of north, south, west, got 'east'"):
        coordinator.revoke(folder, "east")
    coordinator.invite(folder, "east")
    assert coordinator.status(folder)["sites"]["east"] == "invited"
    assert kinds(folder)[-3:] == ["invited", "revoked", "invited"]


def test_a_rotation_is_signed_by_the_old_key_and_open_invitations_name_the_new(
    folder: Path,
) -> None:
    place = Folder.open(folder)
    old = SigningKey.load(place.signing_key).public
    facts = coordinator.rotate(folder)
    new = SigningKey.load(place.signing_key).public
    assert facts["key"] == new.text != old.text
    assert SigningKey.load(folder / "signing.pem.1").public == old
    statement = Rotation.read(folder / "rotation-1.yaml")
    assert statement.verified(old) == new
    assert Invitation.read(place.invitation("west")).coordinator.identity == new
    assert coordinator.status(folder)["fingerprint"] == new.fingerprint
    before = (folder / "signing.pub").read_text()
    coordinator.rotate(folder)
    assert SigningKey.load(folder / "signing.pem.2").public == new
    assert (folder / "rotation-1.yaml").exists()
    # As if it had been killed when the key was new and the public one was not.
    after = (folder / "signing.pub").read_text()
    (folder / "signing.pub").write_text(before)
    key = SigningKey.load(folder / "signing.pem").public
    assert coordinator.finish_rotation(Folder.open(folder), key)
    assert (folder / "signing.pub").read_text() == after
    assert not coordinator.finish_rotation(Folder.open(folder), key)


def test_a_key_with_a_passphrase_needs_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Folder.open(folder)
    place.signing_key.unlink()
    key = SigningKey.generate()
    key.save(place.signing_key, b"secret")
    monkeypatch.delenv(PASSPHRASE_FILE, raising=False)
    with pytest.raises(InputError, match="expected its passphrase"):
        conductor.start(folder)
    file = tmp_path / "passphrase"
    file.write_bytes(b"secret\n")
    assert conductor.read_passphrase(place, file) == b"secret"
    monkeypatch.setenv(PASSPHRASE_FILE, str(file))
    assert conductor.read_passphrase(place) == b"secret"
    rotated = coordinator.rotate(folder, b"secret")
    with pytest.raises(InputError, match="expected a passphrase"):
        SigningKey.load(place.signing_key)
    assert SigningKey.load(place.signing_key, b"secret").public.text == rotated["key"]


def test_public_records_become_features_once(folder: Path) -> None:
    path = folder / "study.yaml"
    values = yaml.safe_load(path.read_text())
    values["evaluation"] = {"data": {"source": "digits"}, "data_is_public": True}
    path.write_text(yaml.safe_dump(values))
    place = Folder.open(folder)
    conductor.measure(place, Silent())
    found = Features(**load_file(place.evaluation))
    assert found.values.shape == (1797, 1, place.settings.dim)
    assert stat.S_IMODE(place.evaluation.stat().st_mode) == 0o644
    before = place.evaluation.stat()
    conductor.measure(place, Silent())
    assert place.evaluation.stat() == before
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("tmp")) == []


def test_status_before_the_first_start(folder: Path) -> None:
    facts = coordinator.status(folder)
    assert facts["running"] is False
    assert facts["rounds"] == {"done": 0, "planned": 4}
    assert facts["quorum"] == 2
    assert facts["epsilon"] is None
    assert (
        PublicKey.parse((folder / "signing.pub").read_text().strip()).fingerprint
        == (facts["fingerprint"])
    )
    assert json.loads(json.dumps(facts)) == facts
    assert coordinator.stop(folder) == {"was running": False}


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_each_part_that_is_killed_is_started_again_and_stop_ends_all(
    folder: Path, tmp_path: Path
) -> None:
    with started(folder) as process:
        until(lambda: process.poll() is not None or runs(folder))
        assert process.poll() is None, process.communicate()
        first = children(folder)
        assert sorted(first) == ["edge", "executor", "superlink"]
        with pytest.raises(InputError, match="already running"):
            conductor.start(folder)
        with pytest.raises(InputError, match="is running; stop it"):
            coordinator.rotate(folder)
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        until(lambda: set(children(folder)) == set(first) and runs(folder))
        assert not set(children(folder).values()) & set(first.values())
        pushed_elsewhere(folder, tmp_path / "marker")
        facts = coordinator.status(folder)
        assert facts["running"] is True
        assert sorted(facts["processes"]) == sorted(first)
        last = children(folder)
        began = time.monotonic()
        assert coordinator.stop(folder) == {"was running": True}
        assert time.monotonic() - began < coordinator.STOP_SECONDS
        assert process.wait(10) == 0
        assert not [pid for pid in last.values() if Path(f"/proc/{pid}").exists()]
        assert not healthy(folder)
    assert kinds(folder)[-1] == "started"


def pushed_elsewhere(folder: Path, marker: Path) -> None:
    """Start a run of another bundle, as whoever reaches SuperLink can: it must not be run."""
    place = Folder.open(folder)
    app = bundle().folder.removeprefix("veilgraft.veilgraft.")
    fab = hostile(f"{app}/../../../../out", marker)
    with Control(place.superlink_port(), place.ca) as control:
        control.start(Bundle(fab))
    digest = hashlib.sha256(fab).hexdigest()

    def failed() -> bool:
        uri = f"file:{place.flower / 'superlink.db'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            query = "SELECT sub_status, details FROM task WHERE fab_hash = ?"
            rows = database.execute(query, (digest,)).fetchall()
        return any(state == "failed" and "not the one" in why for state, why in rows)

    until(failed)
    assert not marker.exists()
    assert not (folder / f"out.{digest[:8]}").exists()


def test_an_app_that_is_killed_is_run_again_and_one_that_gives_up_ends_the_coordinator(
    folder: Path,
) -> None:
    place = Folder.open(folder)
    with started(folder) as process:
        until(lambda: process.poll() is not None or place.status.exists())
        assert process.poll() is None, process.communicate()
        killed = app(folder)
        os.kill(killed, signal.SIGKILL)
        until(lambda: app(folder) not in (None, killed))
        place.outcome.write_text(json.dumps({"error": "1 of 2 sites", "exit_code": 4}))
        _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 4
    assert "1 of 2 sites" in err
    assert children(folder) == {}


def app(folder: Path) -> Any:
    """Return the process id of the ServerApp, the executor's one child; None: not there."""
    executor = children(folder).get("executor")
    found = processes.members({executor}, "\0") if executor else []
    return next((process.pid for process in found if process.pid != executor), None)


def test_a_run_that_is_done_is_shown_and_not_run_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder.open(folder).report.write_text(json.dumps(report()))
    assert conductor.start(folder, as_json=True) == report()
    assert json.loads(capsys.readouterr().out) == report()
    assert coordinator.status(folder)["state"] == "finished"
    assert not (folder / "flower" / "port").exists()


def report() -> dict[str, Any]:
    return {
        "study": {"name": "s", "digest": DIGEST},
        "private": True,
        "seeded": False,
        "rounds": [{"low": None}],
        "final": {
            "accuracy": 0.9,
            "accuracy_interval": None,
            "delta": 1e-5,
            "epsilon_replace_one": 6.0,
        },
        "comparisons": None,
        "sites": [{"site": "a", "epsilon": 3.0}],
    }


@pytest.fixture
def for_all() -> Iterator[tuple[Path, str]]:
    """Give a folder, and a Python, that every user of this machine can reach."""
    system = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or system is None:
        pytest.skip("SKIPPED LOUDLY: users apart need root, and a Python that all may run")
    parent = Path(tempfile.mkdtemp(prefix="veilgraft-test."))
    parent.chmod(0o755)
    try:
        subprocess.run([system, "-m", "venv", "--without-pip", parent / "venv"], check=True)
        python = parent / "venv" / "bin" / "python"
        version = "import sys; print(*sys.version_info[:2], sep='.')"
        found = subprocess.check_output([python, "-c", version], text=True).strip()
        if found != f"{sys.version_info[0]}.{sys.version_info[1]}":
            pytest.skip(f"SKIPPED LOUDLY: {system} is Python {found}")
        own = next(each for each in sys.path if each.endswith("site-packages"))
        (target,) = (parent / "venv").glob("lib/python*/site-packages")
        (target / "own.pth").write_text(f"import site; site.addsitedir({own!r})\n")
        yield parent, str(python)
    finally:
        shutil.rmtree(parent)


def test_only_the_executors_user_may_read_the_signing_key_until_the_run_is_done(
    made: Path, for_all: tuple[Path, str]
) -> None:
    parent, python = for_all
    folder = copied(made, parent)
    place = Folder.open(folder)
    with started(folder, python) as process:
        until(lambda: process.poll() is not None or runs(folder))
        assert process.poll() is None, process.communicate()
        users = {name: Path(f"/proc/{pid}").stat().st_uid for name, pid in children(folder).items()}
        assert users == {"superlink": 64301, "edge": 64301, "executor": 64302}
        assert coordinator.status(folder)["users"] == "apart"
        edge, executor = place.edge_user, place.executor_user
        assert edge is not None
        assert executor is not None
        assert not may(edge, "cat", place.signing_key)
        assert may(executor, "cat", place.signing_key)
        assert not may(executor, "cat", place.tls / "server.key")
        for user in (edge, executor):
            assert not may(user, "cat", place.tls / "ca.key")
            assert not may(user, "mv", place.home, place.flower / "other")
            assert not may(user, "touch", place.home / "apps" / "other")
            assert not may(user, "mv", folder / "study.yaml", folder / "other.yaml")
        assert not may(edge, "mv", place.signing_key, folder / "other.pem")
        place.report.write_text(json.dumps(report()))
        out, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0
        assert "accuracy on public records" in out
    assert coordinator.rotate(folder)["key"]
    assert place.signing_key.stat().st_uid == 64302


def may(user: Any, *command: object) -> bool:
    done = subprocess.run(
        [*conductor.become(user), *map(str, command)], capture_output=True, check=False
    )
    return done.returncode == 0


def test_users_that_can_not_reach_the_program_are_said_so(made: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("SKIPPED LOUDLY: users apart need root")
    folder = copied(made, tmp_path)
    with pytest.raises(InputError, match="user 64301 can't read it: let all users enter"):
        conductor.start(folder)
    assert not (folder / "flower" / "port").exists()

"""The supervisor with real children: what it starts again, stops and leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from veilgraft.errors import InputError, VeilgraftError
from veilgraft_client.separation import Owner, vault_command
from veilgraft_deploy import pidfile, processes, supervisor
from veilgraft_deploy.processes import Process
from veilgraft_deploy.supervisor import Service

DRIVER = """
import json, sys
from pathlib import Path
from veilgraft_deploy.supervisor import Service, supervise

def service(name, folder, code="", command=None, ready=False, **options):
    made = Path(folder) / f"{name}.ready"
    return Service(
        name, command or [sys.executable, "-S", "-c", code], {"FOLDER": folder},
        Path(folder) / f"{name}.log", ready=made.exists if ready else None, **options,
    )

folder, services, pid_file = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
sys.exit(supervise([service(folder=folder, **each) for each in services], pid_file))
"""

NOTE = """
import os, pathlib, signal, subprocess, sys, time
folder, name = pathlib.Path(os.environ["FOLDER"]), os.environ["VEILGRAFT_SERVICE"].split("/")[1]
def note(what):
    with (folder / "events").open("a") as file:
        file.write(f"{name} {what}\\n")
def end(*_):
    note("stopped")
    sys.exit()
signal.signal(signal.SIGTERM, end)
note("started")
"""
STAYS = NOTE + "\nwhile True: time.sleep(1)"
IS_SLOW = NOTE + '\ntime.sleep(0.6); note("ready"); (folder / f"{name}.ready").touch()\n' + STAYS
HAS_CHILD = NOTE + (
    '\nkid = subprocess.Popen(["sleep", "300"], start_new_session=True)\n'
    '(folder / "kid").write_text(str(kid.pid))\nwhile True: time.sleep(1)'
)
IS_DEAF = NOTE + "\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); note('deaf'); time.sleep(300)"

Start = Callable[..., "subprocess.Popen[bytes]"]


def driver(folder: Path, pid_file: Path, *services: dict[str, Any]) -> list[str]:
    return [sys.executable, "-c", DRIVER, str(folder), json.dumps(services), str(pid_file)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    began: list[subprocess.Popen[bytes]] = []

    def start(*services: dict[str, Any]) -> "subprocess.Popen[bytes]":
        with (tmp_path / "supervisor.err").open("ab") as errors:
            process = subprocess.Popen(
                driver(tmp_path, tmp_path / "it.pid", *services), stderr=errors
            )
        began.append(process)
        return process

    yield start
    for process in began:
        process.kill()
        process.wait(5)
    supervisor.stop(tmp_path / "it.pid", 5)


def wait_for(done: Callable[[], Any], seconds: float = 8) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def events(folder: Path) -> list[str]:
    path = folder / "events"
    return path.read_text().splitlines() if path.exists() else []


def child(folder: Path, name: str) -> Process | None:
    found = supervisor.running(folder / "it.pid")
    return Process(*found["children"][name]) if found and name in found["children"] else None


def kid(folder: Path) -> Process:
    number = wait_for(lambda: (folder / "kid").exists() and (folder / "kid").read_text())
    return processes.identity(int(number))


def test_services_start_each_when_the_one_before_is_ready_and_stop_in_reverse(
    start: Start, tmp_path: Path
) -> None:
    process = start(
        {"name": "first", "code": IS_SLOW, "ready": True},
        {"name": "second", "code": STAYS},
        {"name": "third", "code": STAYS},
    )
    wait_for(lambda: len(events(tmp_path)) >= 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    found = events(tmp_path)
    assert found[:3] == ["first started", "first ready", "first started"]
    assert set(found[3:5]) == {"second started", "third started"}
    assert found[5:] == ["third stopped", "second stopped", "first stopped"]
    assert not (tmp_path / "it.pid").exists()


def test_a_child_that_is_killed_starts_again_and_its_own_children_go_first(
    start: Start, tmp_path: Path
) -> None:
    start({"name": "a", "code": HAS_CHILD})
    old = wait_for(lambda: child(tmp_path, "a"))
    grandchild = kid(tmp_path)
    os.kill(old.pid, signal.SIGKILL)
    new = wait_for(lambda: (now := child(tmp_path, "a")) and now != old and now)
    assert processes.alive(new)
    assert not processes.alive(grandchild)
    assert (
        "a: was ended by signal 9; starts again in 0.5 s"
        in (tmp_path / "supervisor.err").read_text()
    )


def test_a_ready_child_is_started_again_however_it_ends_after_growing_pauses(
    start: Start, tmp_path: Path
) -> None:
    ends = NOTE + '\n(folder / f"{name}.ready").touch()\ntime.sleep(0.3)\nsys.exit(305 & 0xff)'
    process = start({"name": "a", "code": ends, "ready": True})
    wait_for(lambda: events(tmp_path).count("a started") >= 4, 15)
    assert process.poll() is None
    told = (tmp_path / "supervisor.err").read_text()
    pauses = [line.split(" in ")[1] for line in told.splitlines() if "starts again" in line]
    assert pauses[:3] == ["0.5 s", "1 s", "2 s"]
    assert "ended with exit status 49" in told


def test_the_pause_grows_to_half_a_minute_and_is_short_again_after_a_minute_of_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pauses(lived: float, count: int) -> list[float]:
        found = []
        for _ in range(count):
            each.started = 1000 - lived
            each._ended(1000)
            found.append(each.due - 1000)
        return found

    each = supervisor._Child(Service("a", ["true"], {}, tmp_path / "a.log"), "mark", settled=True)
    monkeypatch.setattr(each, "_end", lambda: "ended")
    assert pauses(59, 8) == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert pauses(61, 1) == [0.5]


def test_a_child_that_never_gets_ready_ends_the_start_with_one_clear_sentence(
    tmp_path: Path,
) -> None:
    other = Service("other", ["sleep", "300"], {}, tmp_path / "other.log")
    broken = "echo early; echo 'no such thing: x'; exit 2"
    bad = Service("bad", ["sh", "-c", broken], {}, tmp_path / "bad.log", ready=lambda: False)
    with pytest.raises(VeilgraftError) as caught:
        supervisor.supervise([other, bad], tmp_path / "it.pid")
    assert str(caught.value) == (
        f"bad: ended 3 times before it was ready (ended with exit status 2); "
        f"{tmp_path / 'bad.log'} ends with: no such thing: x"
    )
    assert not (tmp_path / "it.pid").exists()
    assert no_sleep_of(tmp_path)


def test_a_command_that_is_missing_is_named_in_the_error(tmp_path: Path) -> None:
    missing = Service("a", ["no-such-program"], {}, tmp_path / "a.log")
    with pytest.raises(VeilgraftError, match=r"a: ended 3 times .*no-such-program: No such file"):
        supervisor.supervise([missing], tmp_path / "it.pid")


def test_a_child_that_is_not_ready_in_time_is_an_error(tmp_path: Path) -> None:
    slow = Service(
        "slow", ["sleep", "300"], {}, tmp_path / "a.log", lambda: False, ready_seconds=0.3
    )
    with pytest.raises(VeilgraftError, match=r"slow: was not ready in 0.3 s; .*\(nothing\)"):
        supervisor.supervise([slow], tmp_path / "it.pid")
    assert no_sleep_of(tmp_path)


def no_sleep_of(folder: Path) -> bool:
    """Return whether no process writes to the folder's logs."""
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if entry.readlink().parent == folder:
                return False
        except OSError:
            continue
    return True


def test_after_kill_9_children_die_at_once_and_the_rest_at_the_next_start(
    start: Start, tmp_path: Path
) -> None:
    process = start({"name": "a", "code": HAS_CHILD})
    old = wait_for(lambda: child(tmp_path, "a"))
    grandchild = kid(tmp_path)
    process.kill()
    process.wait(5)
    wait_for(lambda: not processes.alive(old), 2)
    assert processes.alive(grandchild)
    assert supervisor.running(tmp_path / "it.pid") is None
    (tmp_path / "kid").unlink()
    start({"name": "a", "code": STAYS})
    wait_for(lambda: child(tmp_path, "a"))
    assert not processes.alive(grandchild)


def test_a_vault_in_namespaces_of_its_own_is_ended_just_so(start: Start, tmp_path: Path) -> None:
    tried = ["unshare", "--net", "true"]
    if os.geteuid() != 0 or subprocess.run(tried, timeout=10).returncode:
        pytest.skip("NOT TESTED: needs root, and leave to make a network namespace")
    shell = "setsid sleep 300 & echo $!; exec sleep 300"
    command = vault_command(["sh", "-c", shell], Owner(65010, 65010))
    process = start({"name": "a", "command": command})
    old = wait_for(lambda: child(tmp_path, "a"))
    number = wait_for(lambda: (tmp_path / "a.log").read_text())
    grandchild = processes.identity(int(number))
    process.kill()
    process.wait(5)
    wait_for(lambda: not processes.alive(old), 2)
    assert processes.alive(grandchild)
    assert not supervisor.stop(tmp_path / "it.pid", 5)
    assert not processes.alive(grandchild)


def test_a_supervisor_under_another_leaves_nothing_behind_either(
    start: Start, tmp_path: Path
) -> None:
    inner = driver(tmp_path, tmp_path / "inner.pid", {"name": "a", "code": HAS_CHILD})
    start({"name": "outer", "command": inner})
    grandchild = kid(tmp_path)
    old = wait_for(lambda: child(tmp_path, "outer"))
    (tmp_path / "kid").unlink()
    os.kill(old.pid, signal.SIGKILL)
    wait_for(lambda: (now := child(tmp_path, "outer")) and now != old)
    assert not processes.alive(grandchild)
    grandchild = kid(tmp_path)
    assert supervisor.stop(tmp_path / "it.pid", 5)
    assert not processes.alive(grandchild)
    assert not (tmp_path / "inner.pid").exists()
    assert no_sleep_of(tmp_path)


def test_stop_after_kill_9_ends_what_was_left_and_says_nothing_ran(
    start: Start, tmp_path: Path
) -> None:
    process = start({"name": "a", "code": HAS_CHILD})
    grandchild = kid(tmp_path)
    process.kill()
    process.wait(5)
    assert not supervisor.stop(tmp_path / "it.pid", 5)
    assert not processes.alive(grandchild)
    assert not (tmp_path / "it.pid").exists()


def test_stop_ends_everything_even_a_child_that_is_deaf(start: Start, tmp_path: Path) -> None:
    process = start({"name": "a", "code": IS_DEAF, "stop_seconds": 0.5})
    old = wait_for(lambda: child(tmp_path, "a"))
    wait_for(lambda: "a deaf" in events(tmp_path))
    assert supervisor.stop(tmp_path / "it.pid", 5)
    assert not processes.alive(old)
    assert process.wait(1) == 0
    assert supervisor.running(tmp_path / "it.pid") is None
    assert not supervisor.stop(tmp_path / "it.pid", 5)


def test_stop_kills_a_supervisor_that_does_not_end_in_time(start: Start, tmp_path: Path) -> None:
    process = start({"name": "a", "code": IS_DEAF, "stop_seconds": 60})
    old = wait_for(lambda: child(tmp_path, "a"))
    wait_for(lambda: "a deaf" in events(tmp_path))
    assert supervisor.stop(tmp_path / "it.pid", 0.3)
    assert process.wait(1) == -signal.SIGKILL
    assert not processes.alive(old)


def test_a_process_that_got_a_recorded_number_later_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        pid, starttime = processes.identity(stranger.pid)
        path = tmp_path / "it.pid"
        facts = {"pid": pid, "starttime": starttime - 1, "children": {"a": [pid, starttime - 1]}}
        text = json.dumps({**facts, "mark": "0" * 32, "boot": pidfile._boot()})
        path.write_text(text)
        assert supervisor.running(path) is None
        assert not supervisor.stop(path, 1)
        path.write_text(text)
        assert supervisor.supervise([], path, tick=lambda: False) == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(5)


def test_a_second_start_is_refused_while_the_first_runs(start: Start, tmp_path: Path) -> None:
    process = start({"name": "a", "code": STAYS})
    wait_for(lambda: child(tmp_path, "a"))
    with pytest.raises(InputError, match=rf"it.pid: is already running \(pid {process.pid}\)"):
        supervisor.supervise([], tmp_path / "it.pid")
    assert child(tmp_path, "a")


def test_a_pid_file_of_another_user_is_not_believed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    path = tmp_path / "it.pid"
    path.write_text("{}")
    os.chown(path, 65001, 65001)
    with pytest.raises(InputError, match="belongs to user 65001"):
        supervisor.running(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="can't be opened"):
        supervisor.supervise([], path)


def test_a_log_that_can_not_be_written_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "no such folder" / "a.log"
    with pytest.raises(InputError, match="no such folder: expected a folder"):
        supervisor.supervise([Service("a", ["true"], {}, path)], tmp_path / "it.pid")
    assert not (tmp_path / "it.pid").exists()


def test_a_torn_or_empty_pid_file_is_that_of_nobody(tmp_path: Path) -> None:
    path = tmp_path / "it.pid"
    for text in ("", "{", '{"pid": 1}', "[]", "\0\0"):
        path.write_text(text)
        assert supervisor.running(path) is None
        assert supervisor.supervise([], path, tick=lambda: False) == 0


def test_children_get_a_clean_environment_and_a_log_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEILGRAFT_TEST_SECRET", "s")
    path = tmp_path / "a.log"
    path.write_bytes(b"x" * (supervisor.MAX_LOG_BYTES + 1))
    show = Service("a", ["sh", "-c", "env; echo END; sleep 300"], {"OWN": "1"}, path)
    ended = lambda: "END" not in path.read_text()  # noqa: E731 - a name for a tick
    assert supervisor.supervise([show], tmp_path / "it.pid", tick=ended) == 0
    names = {line.split("=")[0] for line in path.read_text().splitlines()}
    assert names - {"END", "PWD", "_", "SHLVL"} <= {*supervisor.INHERITED, "OWN", processes.MARK}
    assert "OWN" in names
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.log.1").stat().st_size > supervisor.MAX_LOG_BYTES
    assert no_sleep_of(tmp_path)

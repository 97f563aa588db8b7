"""The courier's end: a vault that is late, dies or lives elsewhere; and what it costs to import."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from veilgraft.errors import VeilgraftError
from veilgraft.messages import Envelope
from veilgraft_client.connection import DeskClient, VaultClient

SECONDS = 20.0
SERVER = Path(__file__).with_name("vault_process.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "run").mkdir(mode=0o750)
    return tmp_path


@contextmanager
def vault(folder: Path, *before: str) -> Iterator[int]:
    """Run a vault's process until the end; yields its id."""
    command = [*before, sys.executable, str(SERVER), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "serving\n"
            yield process.pid
        finally:
            process.kill()


class Asking:
    """A request on its way, in a thread."""

    def __init__(self, folder: Path, message: Envelope, seconds: float = SECONDS) -> None:
        self._client = VaultClient(folder / "run" / "courier.sock", seconds)
        self._message = message
        self._answer: Envelope | None = None
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        self._answer = self._client.handle(self._message)

    def answer(self) -> Envelope | None:
        self._thread.join(SECONDS)
        return self._answer


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.02)


def test_a_request_survives_the_death_of_the_vault(folder: Path) -> None:
    message = Envelope(b"once", os.urandom(3 << 20), b"s" * 64)
    (folder / "hang").touch()
    with vault(folder) as process:
        asking = Asking(folder, message)
        until((folder / "arrived").exists)
        os.kill(process, signal.SIGKILL)
    assert (folder / "run" / "courier.sock").exists()  # left behind, and nobody listens
    (folder / "arrived").unlink()
    (folder / "hang").unlink()
    with vault(folder):
        assert asking.answer() == message
    assert (folder / "arrived").read_bytes() == b"once"


def test_a_request_waits_for_a_vault_that_is_late(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    asking = Asking(folder, Envelope(b"early"))
    time.sleep(0.3)
    (folder / "run").mkdir()
    with vault(folder):
        assert asking.answer() == Envelope(b"early")


def test_waiting_ends_and_says_no_path(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(VeilgraftError) as told:
        VaultClient(folder / "run" / "courier.sock", 0.5).handle(Envelope(b"h"))
    assert time.monotonic() - start < 2
    assert str(told.value) == "no answer from the vault: unavailable"


def test_a_vault_that_never_answers_is_not_waited_for_too_long(folder: Path) -> None:
    (folder / "hang").touch()
    with vault(folder), pytest.raises(VeilgraftError, match="deadline exceeded"):
        VaultClient(folder / "run" / "courier.sock", 1.0).handle(Envelope(b"h"))


def test_a_desk_without_a_vault_says_so_at_once(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(VeilgraftError, match="no vault answers"):
        DeskClient(folder / "state" / "local.sock").do("status")
    with pytest.raises(VeilgraftError, match="no vault answers"):
        DeskClient(folder / "none" / "local.sock").do("status")
    assert time.monotonic() - start < 2


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: only root can make a network namespace")
def test_a_vault_without_a_network_answers_a_courier_with_one(folder: Path) -> None:
    message = Envelope(b"h", os.urandom(2 << 20))
    with vault(folder, "unshare", "--net", "--") as process:
        ours, theirs = (Path(f"/proc/{owner}/ns/net").readlink() for owner in ("self", process))
        assert ours != theirs
        assert VaultClient(folder / "run" / "courier.sock", SECONDS).handle(message) == message
        shown = DeskClient(folder / "state" / "local.sock", SECONDS).do("status", "a")
        assert shown == {"verb": "status", "argument": "a"}


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: only root can become another user")
def test_another_user_gets_no_answer_even_where_the_mode_would_let_it(folder: Path) -> None:
    """The socket is opened to all; its folder is passed as an open descriptor."""
    with vault(folder), ExitStack() as held:
        (folder / "run" / "courier.sock").chmod(0o666)
        run = os.open(folder / "run", os.O_PATH | os.O_DIRECTORY)
        held.callback(os.close, run)
        script = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from veilgraft.errors import VeilgraftError\n"
            "from veilgraft.messages import Envelope\n"
            "from veilgraft_client.connection import VaultClient\n"
            "os.fchdir(int(sys.argv[1]))\n"
            "os.setgroups([])\n"
            "os.setresuid(int(sys.argv[2]), int(sys.argv[2]), 0)\n"
            "client = VaultClient(Path('courier.sock'), 1.0)\n"
            "try:\n    print(client.handle(Envelope(b'h')).header)\n"
            "except VeilgraftError as error:\n    print(error)\n"
        )

        def said(uid: int) -> str:
            return subprocess.run(
                [sys.executable, "-c", script, str(run), str(uid)],
                pass_fds=[run],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            ).stdout.strip()

        assert said(0) == "b'h'"
        assert said(64999) == "no answer from the vault: unavailable"


def test_a_courier_imports_no_torch_and_says_nothing_on_stderr(folder: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from veilgraft.errors import VeilgraftError\n"
        "from veilgraft.messages import Envelope\n"
        "from veilgraft_client.connection import VaultClient\n"
        "try:\n    VaultClient(Path('none/courier.sock'), 0.3).handle(Envelope(b'h'))\n"
        "except VeilgraftError:\n    pass\n"
        "heavy = {'torch', 'opacus', 'pyarrow', 'transformers', 'datasets', 'flwr'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print([name for name in sys.modules if name.startswith('veilgraft_client.')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    ours = ["veilgraft_client.sockets", "veilgraft_client.connection"]
    assert done.stdout.splitlines() == ["[]", str(ours)]
    assert done.stderr == ""

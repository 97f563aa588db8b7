"""Locks that end with their process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from veilgraft.durable import BusyError, alone

HOLD = """
import sys, time
from pathlib import Path
from veilgraft.durable import alone
with alone(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_lock_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(BusyError, match="another process has it"), alone(path, 0.3):
                pass
        finally:
            os.kill(other.pid, signal.SIGKILL)
    with alone(path, 0.0):
        pass
    with alone(path, 0.0):
        pass


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), alone(tmp_path / "lock", 0.0):
        pass
    assert not (tmp_path / "elsewhere").exists()

"""The hosts that the tests of a federation stand on leave nothing behind."""

import subprocess
import sys
from pathlib import Path

from tests.system import hosts

from veilgraft_deploy.processes import alive, identity

KILLED = """
import subprocess, time
from tests.system import hosts
folder = hosts.own_folder()
with hosts.network(["one"], folder) as (one,):
    asleep = subprocess.Popen(["nsenter", f"--net={one.namespace}", "--", "sleep", "600"])
    print(folder, one.namespace, asleep.pid, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_run_left_is_ended_and_removed_by_the_next() -> None:
    hosts.skip_loudly(hosts.missing())
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=root
    ) as run:
        try:
            assert run.stdout is not None
            folder, namespace, pid = run.stdout.readline().split()
            asleep = identity(int(pid))
            hosts.tidy()
            assert alive(asleep), "what still runs was taken for a leftover"
        finally:
            run.kill()
    hosts.tidy()
    assert not Path(folder).exists()
    assert not Path(namespace).exists()
    assert not alive(asleep)
    tag = "-".join(Path(namespace).name.split("-")[:3])
    assert not list(hosts.NAMESPACES.glob(f"{tag}-*"))

"""What docs/federation.md says can be done is done here, as it is written, on one machine."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.system import hosts
from tests.system.command import DEMO
from tests.system.digits import rows_of, write_digits
from tests.system.federation import STOP_SECONDS, VEILGRAFT

PAGE = (Path(__file__).parents[2] / "docs" / "federation.md").read_text(encoding="utf-8")
SECONDS = 150


class Machine:
    """One machine with the page's files in a folder, and what was started there."""

    def __init__(self, host: hosts.Host, folder: Path) -> None:
        self._host, self.folder = host, folder
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self._command(line), cwd=self.folder, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done

    def start(self, line: str) -> None:
        with (self.folder / f"{len(self._started)}.log").open("wb") as log:
            process = subprocess.Popen(self._command(line), cwd=self.folder, stdout=log, stderr=log)
        self._started.append(process)

    def _command(self, line: str) -> list[str]:
        words = shlex.split(line, comments=True)
        assert words[0] == "veilgraft", line
        return self._host.command(VEILGRAFT, *words[1:])

    def said(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def end(self) -> None:
        for process in self._started:
            hosts.end(process, STOP_SECONDS)


@pytest.fixture
def machine() -> Iterator[Machine]:
    hosts.skip_loudly(hosts.missing())
    hosts.tidy()
    folder = hosts.own_folder()
    try:
        values = yaml.safe_load((DEMO / "study.yaml").read_text())
        values["backbone"]["path"] = str(DEMO / "backbone")
        values["training"]["rounds"] = 1
        values["aggregation"] = {"quorum": 1, "timeout": 60}
        (folder / "study.yaml").write_text(yaml.safe_dump(values))
        write_digits(folder / "records.parquet", rows_of(("hospital",))["hospital"])
        with hosts.network(["machine"], folder) as [host]:
            here = Machine(host, folder)
            try:
                yield here
            finally:
                here.end()
    finally:
        hosts.delete(folder)


@pytest.mark.drill
def test_the_page_s_commands_lead_from_nothing_to_a_model(machine: Machine) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    study = json.loads(machine.run("veilgraft study check study.yaml --json").stdout)["digest"]
    for line in "".join(blocks).splitlines():
        line = line.replace("sha256:…", study)
        if " start " in line:
            machine.start(line)
            if "coordinator" in line:
                wait_for(machine, lambda: "waiting for sites" in machine.said(), "the edge")
        else:
            machine.run(line)
        if " join " in line:
            # While there is an edge to reach.
            machine.run("veilgraft site check --dir hospital")
    report = machine.folder / "coordinator" / "run" / "report.json"
    wait_for(machine, report.exists, "the report")
    assert json.loads(report.read_text())["private"]
    assert (machine.folder / "coordinator" / "run" / "model" / "head.safetensors").exists()
    for line in re.findall(r"^\| `(veilgraft site [a-z]+ --dir DIR)`", PAGE, re.MULTILINE):
        if " check " not in line:
            assert machine.run(line.replace("DIR", "hospital")).stdout, line


def test_every_command_that_the_page_names_is_one() -> None:
    from tests.system.command import veilgraft

    named = set(re.findall(r"`veilgraft ((?:coordinator|site|log) [a-z]+)", PAGE))
    assert len(named) > 12
    for command in named:
        assert veilgraft(*command.split(), "--help").returncode == 0, command


def wait_for(machine: Machine, holds: object, what: str) -> None:
    end = time.monotonic() + SECONDS
    assert callable(holds)
    while not holds():
        logs = "".join(path.read_text()[-2000:] for path in machine.folder.glob("*.log"))
        assert time.monotonic() < end, f"{what}\n{logs}"
        time.sleep(0.5)

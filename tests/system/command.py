"""The command line, and the demo's study with changes, for the tests in this folder."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import veilgraft_deploy.demo
from veilgraft_deploy import cli

DEMO = Path(veilgraft_deploy.demo.__file__).parent


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def veilgraft(*arguments: object) -> Done:
    """Run the command line in this process, which saves its start: everything else is real."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["veilgraft", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def written(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write the demo's study, with changes, to a folder of its own."""
    values = yaml.safe_load((DEMO / "study.yaml").read_text())
    values["backbone"]["path"] = str(DEMO / "backbone")
    values["training"]["rounds"] = 4
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def one_sentence(done: Done, expected: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("veilgraft: ")
    assert expected in lines[0]

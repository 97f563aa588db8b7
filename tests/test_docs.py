"""What the README says can be done is done here, as it is written."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

import veilgraft_deploy.demo
from veilgraft.study import DataSource, Study, Task
from veilgraft_client import dataset
from veilgraft_deploy import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = Path(veilgraft_deploy.demo.__file__).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("veilgraft ")]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out what the README takes as given: pictures, a model folder, a public study."""
    labels = tuple(str(label) for label in range(10))
    digits = dataset.read(DataSource(source="digits"), Task(labels=labels), modality="image")
    for index in range(400):
        row = digits.table.slice(index, 1).to_pylist()[0]
        folder = tmp_path / "pictures" / labels[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(row["input"])
    (tmp_path / "model").symlink_to(DEMO / "backbone")
    study = yaml.safe_load((DEMO / "study.yaml").read_text())
    study["backbone"]["path"] = str(DEMO / "backbone")
    study["training"]["rounds"] = 2
    study["simulation"]["grid"] = {"epsilon": [1.0, 4.0]}
    (tmp_path / "public.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_and_the_python_of_the_readme_run(desk: Path) -> None:
    assert len(commands()) >= 6
    for command in commands():
        _run(command)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (desk / "runs" / "mine" / "report.json").exists()


def _run(command: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code: object = 0
        except SystemExit as exit_:
            code = exit_.code
    assert not code, f"{shlex.join(command)}: {err.getvalue()}"
    assert out.getvalue()


def test_the_readme_s_study_is_a_study(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    digest = re.search(r"sha256:[0-9a-f]{64}", (DEMO / "study.yaml").read_text())
    assert digest is not None
    path = tmp_path / "study.yaml"
    path.write_text(text.replace("sha256:…", digest[0]))
    shown, shipped = Study.read(path), Study.read(DEMO / "study.yaml")
    assert shown.digest == shipped.digest


def test_every_make_target_that_the_readme_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    named = {target for pair in named for target in pair if target}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_that_the_readme_links_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_test_that_shows_a_promise_is_there() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    file = ""
    named = re.findall(r"`((?:[a-z_/]+\.py)?)(?:::(test_\w+))?`", text)
    tests = [(path, name) for path, name in named if path or name]
    assert len(tests) > 50
    for path, name in tests:
        file = path if "test_" in path else file
        if name:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"def {name}(" in source, f"{file}::{name}"
        elif "test_" in path:
            assert (ROOT / "tests" / path).exists(), path


def test_every_file_that_the_page_on_privacy_links_is_there() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) > 5
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


def test_no_command_is_without_its_help() -> None:
    out = io.StringIO()
    for command in (
        ["--help"],
        *([name, "--help"] for name in ("study", "backbone", "ledger", "site")),
    ):
        with (
            mock.patch.object(sys, "argv", ["veilgraft", *command]),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            cli.main()
    for name in (
        "demo",
        "simulate",
        "predict",
        "init",
        "check",
        "schema",
        "prepare",
        "verify",
        "anchor",
    ):
        assert name in out.getvalue()


def test_every_test_that_security_md_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[a-z_/]+\.py)(?:::(test_\w+))?`", text)
    assert len([name for _, name in named if name]) > 20
    for path, name in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, f"{path}::{name}"

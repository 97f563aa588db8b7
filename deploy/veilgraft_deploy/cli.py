"""The `veilgraft` command: a thin layer over the library.

Errors go to stderr in a sentence. Exit codes: 1 ours, 2 the user's input, 3 refused by policy or
budget, 4 quorum or timeout. No traceback without `--debug`.
"""

import gc
import importlib.resources
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

import veilgraft
from veilgraft.errors import InputError, VeilgraftError
from veilgraft_deploy import coordinator_cli, site_cli
from veilgraft_deploy.show import AsJson, show

if TYPE_CHECKING:
    from veilgraft.study import Study

STARTED = time.perf_counter()

app = typer.Typer(
    name="veilgraft",
    help="Private federated transfer learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
study_app = typer.Typer(help="Write, check and describe study files.", no_args_is_help=True)
backbone_app = typer.Typer(help="Prepare and verify backbones.", no_args_is_help=True)
ledger_app = typer.Typer(help="Look into a site's privacy ledger.", no_args_is_help=True)
log_app = typer.Typer(help="Look into an event log.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(backbone_app, name="backbone")
app.add_typer(ledger_app, name="ledger")
app.add_typer(log_app, name="log")
app.add_typer(coordinator_cli.app, name="coordinator")
app.add_typer(site_cli.app, name="site")

OutFolder = Annotated[Path, typer.Option("--out", help="The run folder.")]
StateFolder = Annotated[
    Path | None,
    typer.Option("--state", help="Folder for features, and a private ledger."),
]
EngineName = Annotated[Literal["inprocess", "ray"], typer.Option(help="What carries messages.")]
Seed = Annotated[
    int | None, typer.Option(help="Make the run reproducible, and so not private.", min=0)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that OUT holds.")]


def main() -> None:
    """Run the command line and exit with its code."""
    debug = "--debug" in sys.argv
    # Imports leave 300,000 objects that live to the end; looking through them again and again for
    # garbage doubled the time of start and exit.
    gc.disable()
    try:
        app()
    except VeilgraftError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"veilgraft: {line}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"veilgraft: {error.filename}: {error.strerror}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        print(  # noqa: T201
            f"veilgraft: internal error: {name}: {error} (--debug shows where)", file=sys.stderr
        )
        sys.exit(1)
    finally:
        _collect_from_now_on()


def _collect_from_now_on() -> None:
    """Leave what is there alone, and collect what comes."""
    gc.freeze()
    gc.enable()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, and show tracebacks.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if debug:
        for name in ("veilgraft", "veilgraft_client", "veilgraft_server", "veilgraft_deploy"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    if version:
        typer.echo(f"veilgraft {veilgraft.__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: OutFolder = Path("runs/demo"),
    state: StateFolder = None,
    engine: EngineName = "inprocess",
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run the study that ships with the package: ten sites, handwritten digits, ε = 3."""
    with importlib.resources.as_file(importlib.resources.files("veilgraft_deploy.demo")) as folder:
        study = _study(folder / "study.yaml")
        _simulate(
            study,
            as_json,
            out=out,
            state=state,
            engine=engine,
            seed=seed,
            compare=True,
            resume=resume,
            overwrite=overwrite,
        )


@app.command()
def simulate(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    out: OutFolder,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Records in place of simulation.data; several: one for each site."),
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Number of sites.", min=1)] = None,
    backbone: Annotated[Path | None, typer.Option(help="The backbone's folder.")] = None,
    state: StateFolder = None,
    engine: EngineName = "inprocess",
    ray_address: Annotated[str | None, typer.Option(help="Of a running Ray cluster.")] = None,
    seed: Seed = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the comparisons.")] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Run every point of simulation.grid instead.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Simulate a study on this machine, from records to model; or plan one, over a grid."""
    if grid:
        _check_alone(compare=compare, resume=resume, seed=seed)
    changed = _with_options(_study(study), data=data, sites=sites, backbone=backbone)
    if grid:
        _sweep(
            changed,
            as_json,
            out=out,
            state=state,
            engine=engine,
            ray_address=ray_address,
            overwrite=overwrite,
        )
        return
    _simulate(
        changed,
        as_json,
        out=out,
        state=state,
        engine=engine,
        seed=seed,
        compare=compare,
        resume=resume,
        overwrite=overwrite,
        ray_address=ray_address,
    )


@app.command()
def predict(
    inputs: Annotated[Path, typer.Argument(help="A table, a folder of images, or one image.")],
    model: Annotated[Path, typer.Option("--model", help="The exported model's folder.")],
    column: Annotated[
        str | None, typer.Option(help="Column of a table; text or image by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print labels and probabilities, as CSV or JSON."""
    from veilgraft_deploy.predict import predict as run

    run(inputs, model, column, as_json=as_json)


@study_app.command("init")
def study_init(
    data: Annotated[Path, typer.Argument(help="Records to look at; they are only read.")],
    backbone: Annotated[Path, typer.Option(help="The backbone's folder.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("study.yaml"),
    name: Annotated[str, typer.Option(help="The study's name.")] = "my-study",
    units: Annotated[
        int | None, typer.Option(help="A round size for each site to declare.", min=1)
    ] = None,
) -> None:
    """Write a commented study file from a look at a data path."""
    from veilgraft_deploy.draft import draft

    if out.exists():
        raise InputError(f"{out}: exists already; name another file with --out")
    text = draft(data, backbone, name, out, units)
    out.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {out}; look it over, then: veilgraft study check {out}")


@study_app.command("check")
def study_check(study: Path, as_json: AsJson = False) -> None:
    """Check a study file, and say what it would spend."""
    from veilgraft.plan import plan

    checked = _study(study)
    planned = plan(checked)
    facts = {
        "name": checked.name,
        "digest": checked.digest,
        "private": checked.private,
        "noise_multiplier": planned.sigma if checked.private else None,
        "epsilon": planned.epsilon(),
        "epsilon_replace_one": planned.epsilon(replace_one=True),
        "delta": planned.delta if checked.private else None,
        "epsilon_rdp": planned.rdp_epsilon(),
        "releases": {kind: count for kind, (count, _) in planned.releases.items()},
    }
    show(facts, as_json)


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file."""
    from veilgraft.study import Study

    typer.echo(json.dumps(Study.model_json_schema(), indent=2, ensure_ascii=False))


@backbone_app.command("prepare")
def backbone_prepare(
    folder: Annotated[Path, typer.Argument(help="A transformers model folder.")],
    out: Annotated[Path, typer.Option("--out", help="Where the prepared folder goes.")],
    public: Annotated[
        Path | None, typer.Option(help="Public records: measures feature statistics.")
    ] = None,
    pooling: Annotated[
        Literal["cls", "mean", "pooler"], typer.Option(help="With --public: as in the study.")
    ] = "mean",
    column: Annotated[str | None, typer.Option(help="With --public: the input's column.")] = None,
    size: Annotated[
        int | None, typer.Option(help="With --public: side in pixels, as in the study.", min=1)
    ] = None,
    max_length: Annotated[int, typer.Option(help="With --public: tokens, as in the study.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Copy what loading needs, hash every file, and measure statistics on public records."""
    from veilgraft_deploy.prepare import prepare

    facts = prepare(
        folder, out, public, pooling=pooling, column=column, size=size, max_length=max_length
    )
    show(facts, as_json)


@backbone_app.command("verify")
def backbone_verify(
    folder: Path,
    digest: Annotated[str | None, typer.Option(help="The digest that is expected.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of a backbone and compare with its manifest and a digest."""
    from veilgraft.model import backbone

    files = backbone.verify(folder, digest)
    show({"digest": backbone.digest(folder), "files": files}, as_json)


@ledger_app.command("show")
def ledger_show(ledger: Path, as_json: AsJson = False) -> None:
    """Show what each site of a ledger has spent."""
    from veilgraft_deploy.books import show

    show(ledger, as_json=as_json)


@ledger_app.command("verify")
def ledger_verify(
    ledger: Path,
    anchor: Annotated[
        str | None, typer.Option(help="What `ledger anchor` printed earlier, or a file of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a ledger's chain, every stored release, and that nothing was rolled back."""
    from veilgraft_deploy.books import anchored, opened

    with opened(ledger) as book:
        known = None if anchor is None else anchored(anchor)
        show({"entries": book.verify(known, let_go=True), "head": book.head()}, as_json)


@ledger_app.command("anchor")
def ledger_anchor(ledger: Path) -> None:
    """Print the chain's head; keep it elsewhere, to notice a ledger that was rolled back."""
    from veilgraft_deploy.books import opened

    with opened(ledger) as book:
        book.verify(let_go=True)
        typer.echo(book.head())


@log_app.command("show")
def log_show(
    path: Annotated[Path, typer.Argument(help="A log, or a site's or coordinator's folder.")],
    as_json: AsJson = False,
) -> None:
    """Print what was noted, oldest first."""
    from veilgraft_deploy import journal

    journal.show(path, as_json=as_json)


@log_app.command("verify")
def log_verify(
    path: Annotated[Path, typer.Argument(help="A log, or a site's or coordinator's folder.")],
    anchor: Annotated[
        str | None, typer.Option(help="A head that was printed earlier, or a file of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that nothing in a log was changed, left out or rolled back."""
    from veilgraft_deploy import journal

    show(journal.verify(path, anchor), as_json)


def _study(path: Path) -> "Study":
    from veilgraft.study import Study

    return Study.read(path)


def _with_options(
    study: "Study", *, data: list[Path] | None, sites: int | None, backbone: Path | None
) -> "Study":
    from veilgraft.study import DataSource

    simulation, spec = study.simulation, study.backbone
    if data:
        first = simulation.data[0].model_dump() if simulation.data else {}
        kept = {k: v for k, v in first.items() if k not in ("path", "source", "format")}
        sources = [DataSource(path=path, **kept) for path in data]
        simulation = simulation.model_copy(update={"data": tuple(sources)})
    if sites is not None:
        simulation = simulation.model_copy(update={"sites": sites})
    if backbone is not None:
        spec = spec.model_copy(update={"path": backbone})
    return study.model_copy(update={"simulation": simulation, "backbone": spec})


def _simulate(study: "Study", as_json: bool, **options: Any) -> None:
    from veilgraft_deploy.progress import Live, table
    from veilgraft_deploy.simulation import simulate as run

    _collect_from_now_on()
    imported = time.perf_counter() - STARTED
    console = Console(stderr=as_json)
    with Live(console) as live:
        report = run(study, watcher=live, imported=imported, **options)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    console.print(table(report))
    console.print(f"run folder: {options['out']}", highlight=False, soft_wrap=True)


def _check_alone(*, compare: bool, resume: bool, seed: int | None) -> None:
    reasons = {
        "--compare": (compare, "a point is compared with the other points"),
        "--resume": (resume, "a sweep that was stopped starts again, with --overwrite"),
        "--seed": (seed is not None, "name seeds in simulation.grid.seeds"),
    }
    for option, (given, reason) in reasons.items():
        if given:
            raise InputError(f"--grid: expected no {option} beside it; {reason}")


def _sweep(study: "Study", as_json: bool, **options: Any) -> None:
    from veilgraft_deploy.progress import Live
    from veilgraft_deploy.sweep import sweep
    from veilgraft_deploy.sweep_report import table

    _collect_from_now_on()
    imported = time.perf_counter() - STARTED
    workers = len(os.sched_getaffinity(0))
    console = Console(stderr=as_json)
    with Live(console) as live:
        report = sweep(study, watcher=live, imported=imported, workers=workers, **options)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    console.print(table(report))
    console.print(f"sweep folder: {options['out']}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

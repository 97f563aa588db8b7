"""The `veilgraft site` commands: a thin layer, as the rest of the command line."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft_deploy.show import AsJson, show

app = typer.Typer(help="Take part in a study as a site.", no_args_is_help=True)

# The courier may enter its folder and not list it.
Folder = Annotated[Path, typer.Option("--dir", help="The site's folder.", readable=False)]


@app.callback()
def _options(
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Its first line protects the site's key.", exists=True)
    ] = None,
) -> None:
    if passphrase_file is not None:
        from veilgraft.identity import PASSPHRASE_FILE

        os.environ[PASSPHRASE_FILE] = str(passphrase_file.resolve())


@app.command()
def join(
    invitation: Annotated[Path, typer.Argument(help="The file that the coordinator gave you.")],
    data: Annotated[Path, typer.Option(help="The records: a file, or a folder of images.")],
    folder: Folder,
    units: Annotated[
        int | None, typer.Option(help="A round number of people or records, to declare.", min=1)
    ] = None,
    label: Annotated[str | None, typer.Option(help="The label's column.")] = None,
    input_: Annotated[str | None, typer.Option("--input", help="The input's column.")] = None,
    unit: Annotated[str | None, typer.Option(help="The column that names the person.")] = None,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Cap on ε for the life of the data.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share never trained on, for life.", min=0, max=0.9)
    ] = None,
    isolation: Annotated[
        Literal["full", "reduced"], typer.Option(help="How far the vault must stand apart.")
    ] = "full",
    courier_user: Annotated[
        str | None, typer.Option(help="The courier's user, by name or number.")
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="The backbone's folder, where it came by hand.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Nobody's privacy is at stake.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="With --public: repeatable noise.", min=0)
    ] = None,
    approve: Annotated[
        str | None, typer.Option(help="The study's digest, to approve without being asked.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make this site's keys and its own file, check everything, and ask for approval."""
    from veilgraft.invitation import Invitation
    from veilgraft_deploy import joining

    invited = Invitation.read(invitation)
    digest = invited.contract.digest
    if approve not in (None, digest):
        raise InputError(f"--approve: the invitation's study is {digest}, got {approve}")
    if units is None:
        if not sys.stdin.isatty():
            raise InputError("--units: missing; declare a round number of people or records")
        units = typer.prompt("units to declare, a round number", type=int, err=True)
    answers = joining.Answers(
        data=data,
        units=units,
        label=label,
        input=input_,
        unit=unit,
        max_epsilon=max_epsilon,
        held_out=held_out,
        public=public,
        seed=seed,
        isolation=isolation,
        courier_user=_courier(courier_user),
    )
    console = Console(stderr=True)
    facts = joining.join(invited, answers, folder, backbone, console, approve)
    show(facts, as_json)


def _courier(named: str | None) -> str | int | None:
    if named is not None:
        return int(named) if named.isdigit() else named
    from veilgraft_deploy.place import DEFAULT_COURIER

    return DEFAULT_COURIER if os.geteuid() == 0 else None


@app.command()
def check(
    folder: Folder,
    study: Annotated[
        str | None,
        typer.Option(help="A study file, or a proposed one's digest; else all approved."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong here, and say what to do; for the site's eyes only."""
    from veilgraft_deploy import doctor
    from veilgraft_deploy.place import Place

    place = Place.open(folder)
    facts, problems = doctor.check(place, doctor.named(place, study) if study else None)
    show({**facts, **({"problems": problems} if as_json else {})}, as_json)
    if problems:
        raise InputError(*problems)


@app.command()
def start(folder: Folder) -> None:
    """Run vault and courier until they are stopped; what ends is started again."""
    from veilgraft_deploy import courier
    from veilgraft_deploy.place import Place

    courier.start(Place.open(folder))


@app.command()
def stop(folder: Folder) -> None:
    """Stop what `start` runs."""
    from veilgraft_deploy import courier
    from veilgraft_deploy.place import Place

    place = Place.open(folder)
    typer.echo("stopped" if courier.stop(place) else "was not running")


@app.command()
def approve(
    folder: Folder,
    what: Annotated[
        str | None, typer.Argument(help="A study's digest, or a coordinator's rotation-N.yaml.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Approve a proposed study, or a coordinator's new key; without a name, show what waits."""
    from veilgraft_deploy import doctor, joining
    from veilgraft_deploy.office import order
    from veilgraft_deploy.place import Place

    place = Place.open(folder)
    if what is None:
        show({"proposed": order(place, "status")["proposed"]}, as_json)
        return
    if not what.startswith("sha256:"):
        show(joining.accept_rotation(place, Path(what), ask=not yes), as_json)
        return
    if not yes:
        show(doctor.price(place, what), as_json=False)
        if not typer.confirm("Approve this study?", err=True):
            raise RefusedError(Refusal.STUDY_NOT_APPROVED, f"{what}: not approved")
    show(order(place, "approve", what), as_json)


@app.command()
def reject(
    folder: Folder,
    digest: Annotated[str, typer.Argument(help="The study's digest.")],
    as_json: AsJson = False,
) -> None:
    """Let go of a study that was proposed."""
    _ordered(folder, "reject", digest, as_json)


@app.command()
def withdraw(
    folder: Folder,
    digest: Annotated[str, typer.Argument(help="The study's digest.")],
    as_json: AsJson = False,
) -> None:
    """Serve a study no longer; what was released stays released."""
    _ordered(folder, "withdraw", digest, as_json)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show what was approved, spent and left, and whether the site runs."""
    from veilgraft_deploy import office, supervisor
    from veilgraft_deploy.place import Place

    place = Place.open(folder)
    running = supervisor.running(place.pid_file) if place.pid_file.exists() else None
    facts = {"running": sorted(running["children"]) if running else []}
    show({**facts, **office.order(place, "status")}, as_json)


@app.command()
def ledger(folder: Folder, as_json: AsJson = False) -> None:
    """Show what the site's ledger holds."""
    from veilgraft_deploy.books import show as books
    from veilgraft_deploy.place import Place

    place = Place.open(folder)
    with place.as_owner():
        books(place.site.state / "ledger.db", as_json=as_json)


@app.command()
def purge(folder: Folder, as_json: AsJson = False) -> None:
    """Remove features and cached backbones; ledger and keys stay."""
    _ordered(folder, "purge", "", as_json)


@app.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check the chains of ledger and event log."""
    _ordered(folder, "verify", "", as_json)


@app.command()
def metrics(folder: Folder) -> None:
    """Print the vault's figures for Prometheus, for the site's own people."""
    from veilgraft_deploy.office import order
    from veilgraft_deploy.place import Place

    typer.echo(order(Place.open(folder), "metrics")["text"], nl=False)


@app.command(hidden=True)
def vault(folder: Folder) -> None:
    """Serve the vault; `start` runs it, a container or a unit does."""
    from veilgraft_deploy.office import serve
    from veilgraft_deploy.place import Place

    serve(Place.open(folder))


@app.command(hidden=True)
def courier(folder: Folder) -> None:
    """Run SuperNode and executor; `start` runs it, a container or a unit does."""
    from veilgraft_deploy.courier import courier as run

    run(folder)


@app.command(hidden=True)
def health(folder: Folder) -> None:
    """Exit with 0 where the vault answers, on whichever socket this user may open."""
    from veilgraft_client.connection import healthy
    from veilgraft_deploy.place import Place

    place = Place(folder.resolve())
    if not (healthy(place.desk) or healthy(place.socket)):
        raise typer.Exit(1)


@app.command(hidden=True)
def examine(
    site: Annotated[Path, typer.Argument(help="The site's own file.")],
    study: Annotated[Path, typer.Option(help="The study file.")],
    backbone: Annotated[Path | None, typer.Option(help="The backbone's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a site's records and say what a study would cost it; `check` runs it."""
    from veilgraft_client.policy import Site
    from veilgraft_client.studies import Studies
    from veilgraft_deploy.examination import examine as run
    from veilgraft_deploy.progress import Live

    with Live(Console(stderr=True)) as live:
        facts = run(Site.read(site), Studies.read(study), live, backbone)
    show(facts, as_json)


def _ordered(folder: Path, verb: str, argument: str, as_json: bool) -> None:
    from veilgraft_deploy.office import order
    from veilgraft_deploy.place import Place

    show(order(Place.open(folder), verb, argument), as_json)

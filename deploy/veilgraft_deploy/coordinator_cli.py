"""The `veilgraft coordinator` commands: a thin layer, as the rest of the command line."""

from pathlib import Path
from typing import Annotated

import typer

from veilgraft_deploy.show import AsJson, show

app = typer.Typer(help="Run a study as its coordinator.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The coordinator's folder.", readable=False)
]
Passphrase = Annotated[
    Path | None, typer.Option(help="Its first line protects the signing key.", exists=True)
]


@app.command()
def init(
    folder: Folder,
    study: Annotated[Path, typer.Option(help="The study file.")],
    host: Annotated[str, typer.Option(help="The name or address under which sites find it.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, with commas between them.")],
    port: Annotated[int, typer.Option(help="The edge's port.", min=1, max=65535)] = 9443,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make keys, certificates, and an invitation for each site."""
    from veilgraft.identity import passphrase
    from veilgraft_deploy import coordinator

    protected = passphrase(passphrase_file) if passphrase_file else None
    named = [name.strip() for name in sites.split(",") if name.strip()]
    show(coordinator.init(folder, study, host, named, port, protected), as_json)


@app.command()
def start(folder: Folder, passphrase_file: Passphrase = None, as_json: AsJson = False) -> None:
    """Run the study: SuperLink, executor, edge, and all rounds; goes on where it was ended."""
    from veilgraft_deploy.conductor import start as run

    run(folder, as_json=as_json, passphrase_file=passphrase_file)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show sites, rounds, quorum and processes."""
    from veilgraft_deploy import coordinator

    show(coordinator.status(folder), as_json)


@app.command("study")
def change(
    folder: Folder,
    study: Annotated[Path, typer.Argument(help="The next study's file.")],
    as_json: AsJson = False,
) -> None:
    """Put another study in the place of the one that was run; sites approve it anew."""
    from veilgraft_deploy import coordinator

    show(coordinator.change(folder, study), as_json)


@app.command()
def invite(folder: Folder, site: str, as_json: AsJson = False) -> None:
    """Write a new invitation for a site; what it enrolled with before is forgotten."""
    from veilgraft_deploy import coordinator

    show(coordinator.invite(folder, site), as_json)


@app.command()
def revoke(folder: Folder, site: str, as_json: AsJson = False) -> None:
    """Shut a site out, from its next message on."""
    from veilgraft_deploy import coordinator

    show(coordinator.revoke(folder, site), as_json)


@app.command()
def rotate(folder: Folder, passphrase_file: Passphrase = None, as_json: AsJson = False) -> None:
    """Replace the signing key; sites approve the statement that the old one signs."""
    from veilgraft_deploy import conductor, coordinator
    from veilgraft_server.folder import Folder as Place

    passphrase = conductor.read_passphrase(Place.open(folder), passphrase_file)
    show(coordinator.rotate(folder, passphrase), as_json)


@app.command()
def stop(folder: Folder, as_json: AsJson = False) -> None:
    """Stop what `start` runs."""
    from veilgraft_deploy import coordinator

    show(coordinator.stop(folder), as_json)


@app.command(hidden=True)
def superlink(folder: Folder) -> None:
    """Run the SuperLink; `start` runs it, a container or a unit does."""
    from veilgraft_deploy import parts

    parts.superlink(folder)


@app.command(hidden=True)
def executor(folder: Folder) -> None:
    """Run Flower's executor; `start` runs it, a container or a unit does."""
    from veilgraft_deploy import parts

    parts.executor(folder)


@app.command(hidden=True)
def edge(folder: Folder) -> None:
    """Run the edge; `start` runs it, a container or a unit does."""
    from veilgraft_deploy import parts

    parts.edge(folder)


@app.command(hidden=True)
def prepare(folder: Folder) -> None:
    """Bring the folder up to date before its parts start; containers and units run it."""
    from veilgraft_deploy import conductor

    conductor.prepare(folder)


@app.command(hidden=True)
def conduct(folder: Folder, as_json: AsJson = False) -> None:
    """Start and watch the run of parts that something else keeps alive."""
    from veilgraft_deploy import conductor

    conductor.conduct(folder, as_json=as_json)

"""The coordinator's certificates, and the one bundle that Flower may carry."""

import contextlib
import datetime
import hashlib
import io
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import veilgraft
from veilgraft.errors import InputError
from veilgraft_deploy import launch, provision


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    provision.authority(tmp_path, "coordinator.example")
    provision.certify(tmp_path, "coordinator.example")
    return tmp_path


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Answer one TLS handshake on loopback with the folder's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(10)

    def answer() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.settimeout(10)
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        thread.join(20)
        listening.close()


def handshake(folder: Path, ca: Path, name: str) -> None:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        served(folder) as port,
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname=name),
    ):
        pass


@pytest.mark.parametrize("name", ["coordinator.example", "localhost", "127.0.0.1"])
def test_the_server_is_trusted_by_the_ca_under_each_of_its_names(tls: Path, name: str) -> None:
    handshake(tls, tls / "ca.pem", name)


def test_the_server_is_not_trusted_under_another_name_or_by_another_ca(
    tls: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tls, tls / "ca.pem", "other.example")
    other = tmp_path_factory.mktemp("other")
    provision.authority(other, "coordinator.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tls, other / "ca.pem", "coordinator.example")


def test_the_ca_is_worth_nothing_for_another_name(tls: Path) -> None:
    provision.certify(tls, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        handshake(tls, tls / "ca.pem", "elsewhere.example")


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7"])
def test_an_address_may_be_the_host(tmp_path: Path, host: str) -> None:
    provision.authority(tmp_path, host)
    provision.certify(tmp_path, host)
    handshake(tmp_path, tmp_path / "ca.pem", host)


def test_keys_are_the_owners_alone_and_never_replaced(tls: Path) -> None:
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tls / name).stat().st_mode) == 0o600
    with pytest.raises(InputError, match="never replaced"):
        provision.authority(tls, "coordinator.example")


def test_the_ca_signs_servers_alone_on_p256(tls: Path) -> None:
    ca = certificate(tls / "ca.pem")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == (
        x509.BasicConstraints(ca=True, path_length=0)
    )
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_a_server_certificate_is_renewed_only_in_its_last_30_days(tls: Path) -> None:
    before = certificate(tls / "server.pem")
    life = before.not_valid_after_utc - before.not_valid_before_utc
    assert life == datetime.timedelta(days=397)
    key = (tls / "server.key").read_bytes()
    early = before.not_valid_after_utc - datetime.timedelta(days=30, minutes=1)
    assert not provision.renew(tls, "coordinator.example", early)
    assert provision.renew(tls, "coordinator.example", early + datetime.timedelta(minutes=2))
    assert certificate(tls / "server.pem").serial_number != before.serial_number
    assert (tls / "server.key").read_bytes() == key
    handshake(tls, tls / "ca.pem", "coordinator.example")


def test_a_broken_certificate_is_said_so(tls: Path) -> None:
    (tls / "server.pem").write_text("nonsense")
    with pytest.raises(InputError, match=r"server\.pem: can't be read as a certificate"):
        provision.renew(tls, "coordinator.example")


def test_the_bundle_is_the_same_in_every_process_and_holds_no_code() -> None:
    script = "from veilgraft_deploy import provision; print(provision.bundle().digest)"
    others = {
        subprocess.run(
            [sys.executable, "-P", "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    made = provision.bundle()
    assert others == {made.digest}
    with zipfile.ZipFile(io.BytesIO(made.content)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        # Not compressed: the bytes hang on no version of zlib.
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
        text = archive.read("pyproject.toml").decode()
    assert f'version = "{veilgraft.__version__}"' in text
    assert 'serverapp = "veilgraft_server.app:app"' in text
    assert 'clientapp = "veilgraft_client.app:app"' in text


def test_the_bundle_is_installed_where_flower_looks_and_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.common.config import get_project_config, get_project_dir

    home = tmp_path / "home"
    app = provision.install_bundle(home)
    made = provision.bundle()
    monkeypatch.setenv("FLWR_HOME", str(home))
    assert get_project_dir("veilgraft/veilgraft", veilgraft.__version__, made.digest) == app
    assert get_project_config(app)["tool"]["flwr"]["app"]["publisher"] == "veilgraft"
    for path in [home, *home.rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222, path
    assert provision.install_bundle(home) == app  # again, in its place
    assert launch.only_installed(made.content, skip_prompt=True) == app


def loaded(home: Path, side: str) -> str:
    """Load an app from the installed bundle as Flower does; return what came, or why not."""
    script = {
        "clientapp": (
            "from flwr.clientapp.utils import get_load_client_app_fn as f\n"
            "app = f(default_app_ref='', app_path=None, multi_app=True)(*sys.argv[1:4])\n"
        ),
        "serverapp": (
            "from flwr.common.config import get_project_config, get_project_dir\n"
            "from flwr.serverapp.server_app import LoadServerAppError\n"
            "from flwr.supercore.object_ref import load_app\n"
            "where = get_project_dir(*sys.argv[1:4])\n"
            "named = get_project_config(where)['tool']['flwr']['app']['components']['serverapp']\n"
            "app = load_app(named, LoadServerAppError, where)\n"
        ),
    }[side]
    facts = ["veilgraft/veilgraft", veilgraft.__version__, provision.bundle().digest]
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\n{script}print(type(app).__name__)", *facts],
        env={**os.environ, "FLWR_HOME": str(home), "VEILGRAFT_COORDINATOR": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip() or done.stderr


def test_flower_loads_both_installed_apps_from_the_installed_bundle(tmp_path: Path) -> None:
    provision.install_bundle(tmp_path / "home")
    assert loaded(tmp_path / "home", "clientapp") == "ClientApp"
    assert loaded(tmp_path / "home", "serverapp") == "ServerApp"


def hostile(version: str, marker: Path) -> bytes:
    """Return a bundle of ours by name, with code that leaves a mark when it is loaded."""
    from flwr.cli.build import build_fab_from_files

    manifest = f"""
        [project]
        name = "veilgraft"
        version = "{version}"
        [tool.flwr.app]
        publisher = "veilgraft"
        [tool.flwr.app.components]
        serverapp = "evil:app"
        clientapp = "evil:app"
    """
    code = f"open({str(marker)!r}, 'w')\n"
    files = {"pyproject.toml": manifest.encode(), "evil.py": code.encode()}
    content: bytes = build_fab_from_files(files)[0]
    return content


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_bundle_whose_version_leads_elsewhere_is_refused_where_flower_would_unpack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.cli.install import install_from_fab

    home = tmp_path / "home"
    app = provision.install_bundle(home)
    monkeypatch.setenv("FLWR_HOME", str(home))
    version = app.name.removeprefix("veilgraft.veilgraft.") + "/../../../out"
    fab = hostile(version, tmp_path / "marker")
    short = hashlib.sha256(fab).hexdigest()[:8]
    with contextlib.redirect_stdout(io.StringIO()):
        install_from_fab(fab, skip_prompt=True)
    # Why `launch` is there; when Flower has learned to refuse it, this line fails.
    assert (tmp_path / f"out.{short}" / "evil.py").exists()
    with pytest.raises(PermissionError, match="not the one that is installed"):
        launch.only_installed(fab, skip_prompt=True)


@pytest.mark.parametrize("name", ["flwr-model", "flwr-agentapp", "flwr-connector"])
def test_what_is_no_installed_app_is_not_started(tmp_path: Path, name: str) -> None:
    provision.install_bundle(tmp_path / "home")
    done = subprocess.run(
        [tmp_path / "home" / "bin" / name, "--token", "t"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "refused" in done.stderr


@pytest.mark.parametrize("name", ["flwr-clientapp", "flwr-serverapp"])
def test_the_installed_apps_start_with_flower_guarded(tmp_path: Path, name: str) -> None:
    provision.install_bundle(tmp_path / "home")
    done = subprocess.run(
        [tmp_path / "home" / "bin" / name, "--help"],
        env={**os.environ, "FLWR_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--runtime-api-address" in done.stdout

"""What a coordinator needs before Flower runs: its own CA, a server certificate, the bundle.

The CA is good for the coordinator's names alone (name constraints, path length 0), so that a site
that pins it trusts nothing else by it. The bundle that travels through Flower is the same bytes for
one version of Veilgraft and Flower at every party, and names only what is installed there.
"""

import contextlib
import datetime
import hashlib
import importlib.resources
import io
import ipaddress
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import veilgraft
from veilgraft.durable import sync_folder, write_atomically, write_new
from veilgraft.errors import InputError

CA_YEARS = 10
SERVER_DAYS = 397
RENEW_DAYS = 30
PUBLISHER = "veilgraft"
COMMANDS = (
    "flwr-agentapp",
    "flwr-clientapp",
    "flwr-connector",
    "flwr-model",
    "flwr-serverapp",
    "flwr-simulation",
)
"""All that a Flower executor may start; `launch` runs the two apps and refuses the rest."""

_LOOPBACK = ("localhost", "127.0.0.1")


def authority(folder: Path, host: str) -> None:
    """Write `ca.key` (mode 0600) and `ca.pem`, good for `host` and loopback alone.

    Raises:
        InputError: the folder holds a CA already.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Veilgraft CA for {host}"[:64])])
    permitted = [_constraint(each) for each in _names(host)]
    builder = _builder(name, name, key.public_key(), key.public_key(), 365 * CA_YEARS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, None), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / "ca.key", key)
    write_atomically(folder / "ca.pem", certificate.public_bytes(Encoding.PEM))


def certify(folder: Path, host: str) -> None:
    """Write `server.pem`, signed by the folder's CA, and `server.key` where there is none.

    Raises:
        InputError: the CA's key or certificate can't be read.
    """
    authority_key, issuer = _key(folder / "ca.key"), _certificate(folder / "ca.pem")
    if not (folder / "server.key").exists():
        _write_key(folder / "server.key", ec.generate_private_key(ec.SECP256R1()))
    key = _key(folder / "server.key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    builder = _builder(
        name, issuer.subject, key.public_key(), authority_key.public_key(), SERVER_DAYS
    )
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general(each) for each in _names(host)]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    write_atomically(folder / "server.pem", certificate.public_bytes(Encoding.PEM))


def renew(folder: Path, host: str, now: datetime.datetime | None = None) -> bool:
    """Make a new server certificate where fewer than 30 days are left; the key stays.

    Returns:
        Whether one was made.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    left = _certificate(folder / "server.pem").not_valid_after_utc - now
    if left >= datetime.timedelta(days=RENEW_DAYS):
        return False
    certify(folder, host)
    return True


@dataclass(frozen=True)
class Bundle:
    """The Flower bundle: a zip archive of one `pyproject.toml`, stored, with a fixed date."""

    content: bytes

    @property
    def digest(self) -> str:
        """The hex SHA-256, as Flower names the bundle."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def folder(self) -> str:
        """The folder's name under `FLWR_HOME/apps`."""
        return f"{PUBLISHER}.veilgraft.{veilgraft.__version__}.{self.digest[:8]}"


def bundle() -> Bundle:
    """Build the bundle with Flower's own code; the same bytes on every machine."""
    from flwr.cli.build import build_fab_from_files

    with warnings.catch_warnings():
        # Flower 1.41 asks pathspec for a name that is out of use.
        warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)
        return Bundle(build_fab_from_files({"pyproject.toml": _manifest()})[0])


def install_bundle(home: Path) -> Path:
    """Make `home` a read-only FLWR_HOME that holds the bundle and nothing else; return the app.

    `home/apps` is as Flower would have installed it, `home/bundle.fab` the bundle's bytes, and
    `home/bin` the commands that an executor finds on its PATH (see `launch`). Folders are 0555,
    files 0444; the courier must be another user than the owner. What `home` held is replaced.
    """
    from flwr.cli.install import install_from_fab

    made = bundle()
    home.parent.mkdir(parents=True, exist_ok=True)
    for left in home.parent.glob(f".{home.name}.*"):
        _remove(left)
    # Mode 0700, and a name that nobody could have put a link in the place of.
    fresh = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    with contextlib.redirect_stdout(io.StringIO()):
        app = install_from_fab(made.content, fresh, skip_prompt=True)
    if app != fresh / "apps" / made.folder:
        raise RuntimeError(f"Flower installed the bundle as {app.name}, not {made.folder}")
    (fresh / "bundle.fab").write_bytes(made.content)
    _write_commands(fresh / "bin")
    _seal(fresh)
    _remove(home)
    fresh.rename(home)
    sync_folder(home.parent)
    return home / "apps" / made.folder


def is_current(home: Path) -> bool:
    """Return whether `home` holds this version's bundle, and commands that run this Python."""
    try:
        started = (home / "bin" / COMMANDS[0]).read_text(encoding="utf-8")
        held = (home / "bundle.fab").read_bytes()
    except OSError:
        return False
    return held == bundle().content and started == _command(COMMANDS[0])


def _manifest() -> bytes:
    template = importlib.resources.files("veilgraft_deploy") / "bundle" / "pyproject.toml"
    text = template.read_text(encoding="utf-8")
    return text.replace("@VERSION@", veilgraft.__version__).encode()


def _write_commands(folder: Path) -> None:
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(_command(name), encoding="utf-8")


def _command(name: str) -> str:
    python = shlex.quote(sys.executable)
    return f'#!/bin/sh\nexec {python} -P -m veilgraft_deploy.launch {name} "$@"\n'


def _seal(home: Path) -> None:
    for path in home.rglob("*"):
        if path.is_file():
            path.chmod(0o555 if path.parent == home / "bin" else 0o444)
    for path in [*(each for each in home.rglob("*") if each.is_dir()), home]:
        path.chmod(0o555)


def _remove(home: Path) -> None:
    if home.is_symlink() or home.is_file():
        home.unlink()
    elif home.exists():
        for folder, _, _ in os.walk(home):
            Path(folder).chmod(0o700)
        shutil.rmtree(home)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    # An hour back, for sites whose clocks are behind.
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(host: str) -> list[str]:
    return [host, *(each for each in _LOOPBACK if each != host)]


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _constraint(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_network(name))
    except ValueError:
        return x509.DNSName(name)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(path, pem)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise InputError(f"{path}: can't be read as a private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: expected an elliptic-curve key")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: can't be read as a certificate") from None

"""A site's own requests to the coordinator's edge, beside what Flower asks: to be let in.

What is pinned is one host under one CA: no proxy of the environment, and no other place that an
answer points to, is ever asked.
"""

import http.client
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPMessage
from typing import IO

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from veilgraft.config import canonical
from veilgraft.errors import InputError, VeilgraftError
from veilgraft.identity import SigningKey, passphrase
from veilgraft.invitation import Coordinator, Invitation
from veilgraft_deploy.place import Place

ENROL_SECONDS = 30.0
ENROL_PATH = "/veilgraft/enrol"
FAILURES = (OSError, http.client.HTTPException)
"""What a request raises that got no answer in HTTP."""


class _Here(urllib.request.HTTPRedirectHandler):
    """Follows no redirect; it is an error, as any answer but 200."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Give up."""


def opener(coordinator: Coordinator) -> urllib.request.OpenerDirector:
    """Return what asks the edge and nobody else; raises `InputError` where the CA is none."""
    try:
        context = ssl.create_default_context(cadata=coordinator.ca)
    except (ssl.SSLError, ValueError):
        raise InputError(f"{coordinator.address}: ca: expected a certificate as PEM") from None
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _Here()
    )


def enrol(place: Place, invitation: Invitation) -> None:
    """Show the edge both keys and the token; the same again changes nothing.

    Raises:
        InputError: the edge says no: token used, expired or revoked.
        VeilgraftError: the edge can't be reached, or is not the one that the invitation names.
    """
    with place.as_owner():
        identity = SigningKey.load(place.identity, passphrase())
    node = _node_key(place)
    public = node.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    body = canonical(
        {
            "site": invitation.site,
            "token": invitation.token,
            "identity": identity.public.text,
            "node": public.decode(),
            "time": int(time.time()),
        }
    ).encode()
    proofs = {
        "content-type": "application/json",
        "x-veilgraft-signature": identity.sign("enrolment", body).hex(),
        "x-veilgraft-node-signature": node.sign(body, ec.ECDSA(hashes.SHA256())).hex(),
    }
    _post(invitation.coordinator, body, proofs)


def _node_key(place: Place) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(place.node_key.read_bytes(), None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{place.node_key}: can't be read as a key; remove it, and join again")
    return key


def _post(coordinator: Coordinator, body: bytes, headers: dict[str, str]) -> None:
    url = f"https://{coordinator.address}{ENROL_PATH}"
    request = urllib.request.Request(url, body, headers)
    edge = opener(coordinator)
    try:
        with edge.open(request, timeout=ENROL_SECONDS) as answer:
            answer.read(4096)
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise InputError(
                "invitation: the coordinator refuses it: used by other keys, expired or revoked, "
                "or this machine's clock is wrong; ask for a new one"
            ) from None
        raise VeilgraftError(
            f"{coordinator.address}: can't enrol now (HTTP {error.code}); try again"
        ) from None
    except FAILURES as error:
        reason = getattr(error, "reason", error)
        raise VeilgraftError(
            f"{coordinator.address}: can't be reached ({reason}); the site needs to open a TCP "
            "connection there"
        ) from None
